"""The stack on carried junctions, and all changes that must keep taking effect in it."""

import pytest
import torch
import torch.nn as nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from ditfast.models import Carry, DiTBlock
from ditfast.models.blocks import Attention, Mlp
from ditfast.ops.backends.choice import use_backend
from ditfast.ops.backends.log import record


@pytest.fixture
def inputs(kit):
    x, t, y = kit.batch()
    return x.requires_grad_(), t, y


def test_equals_the_same_blocks_called_alone(kit, inputs):
    x, t, y = inputs
    model = kit.tiny()
    out = model(x, t, y)
    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y, False)
    for block in model.blocks:
        tokens = block(tokens, c)
        assert type(tokens) is torch.Tensor
    alone = model.unpatchify(model.final_layer(tokens, c))
    kit.close(out, alone, 2e-6)
    kit.close(kit.gradients(model, out, x), kit.gradients(model, alone, x), 5e-6)


def test_equals_the_original_sequence(kit, inputs):
    model = kit.tiny()
    out, expected = model(*inputs), kit.original(model, *inputs)
    kit.close(out, expected, 2e-6)
    kit.close(kit.gradients(model, out, inputs[0]), kit.gradients(model, expected, inputs[0]), 5e-6)


def test_each_sample_has_its_own_modulation(kit):
    model, (x, t, y) = kit.tiny(), kit.batch()
    for i in range(3):
        kit.close(model(x, t, y)[i], model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], 5e-6)


def test_one_pass_per_junction(kit, inputs):
    with record() as log:
        kit.tiny()(*inputs)
    assert len(log["gated_residual_layer_norm_modulate"]) == 6  # 3 inside the blocks, 3 between and after them
    assert len(log["layer_norm_modulate"]) == 1 and "gated_residual" not in log
    assert len(log["mlp"]) == 3 and len(log["patch_embed"]) == 1


def test_silu_of_the_conditioning_is_computed_once(kit, inputs, monkeypatch):
    calls, silu = [], nn.functional.silu
    monkeypatch.setattr(nn.functional, "silu", lambda c, **options: calls.append(c) or silu(c, **options))
    kit.tiny()(*inputs)
    assert len(calls) == 2  # one in the timestep embedder, one for all blocks


@pytest.mark.parametrize("name", ("auto", "reference"))
def test_block_returns_what_it_takes(kit, name):
    block = kit.tiny().blocks[0]
    x, c = kit.arr("tokens", (2, 5, 32)), kit.arr("c", (2, 32))
    carry = Carry(x, None, None, None, nn.functional.silu(c), (name,))
    carried = block(carry, c)
    assert isinstance(carried, Carry)
    # the bias is copied only with several ranks, where FSDP may free it: see test_fsdp.py
    assert carried.bias is (None if name == "auto" else block.mlp.fc2.bias)
    y = carried.y if carried.bias is None else carried.y + carried.bias
    kit.close(carried.x + carried.gate.unsqueeze(1) * y, kit.original_block(block, x, c), 2e-6)
    with use_backend(name):
        kit.close(block(x, c), kit.original_block(block, x, c), 2e-6)


@pytest.mark.parametrize("wanted", [[0], [2, 0], range(3), []])
def test_return_hidden(kit, inputs, wanted):
    x, t, y = inputs
    model = kit.tiny()
    out, hidden = model(x, t, y, return_hidden=wanted)
    kit.close(out, model(x, t, y), 2e-6)
    tokens, c = model.x_embedder(x) + model.pos_embed, model.t_embedder(t) + model.y_embedder(y, False)
    expected = []
    for block in model.blocks:
        tokens = kit.original_block(block, tokens, c)
        expected.append(tokens)
    assert len(hidden) == len(wanted)
    for i, got in zip(wanted, hidden, strict=True):
        kit.close(got, expected[i], 2e-6)
        weight = kit.arr("hidden", tuple(got.shape))
        grads = [torch.autograd.grad((h * weight).sum(), x, retain_graph=True)[0] for h in (got, expected[i])]
        kit.close(*grads, 5e-6)


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Called(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


def swap(change):
    def apply(parent, name):
        setattr(parent, name, change(getattr(parent, name)))

    return apply


def become(cls):
    def convert(linear):
        twin = cls(linear.in_features, linear.out_features)
        twin.load_state_dict(linear.state_dict())
        return twin

    return swap(convert)


def hook(parent, name):
    getattr(parent, name).register_forward_hook(lambda module, args, out: 2 * out)


def pre_hook(parent, name):
    getattr(parent, name).register_forward_pre_hook(lambda module, args: (args[0].relu(),))


def patch(parent, name):
    module = getattr(parent, name)
    module.forward = lambda x, forward=module.forward: 2 * forward(x)


def negate(parent, name):
    parametrize.register_parametrization(getattr(parent, name), "weight", Negative())


CHANGES = {
    "lora": swap(LoRA),
    "forward": become(Doubled),
    "call": become(Called),
    "hook": hook,
    "pre_hook": pre_hook,
    "patch": patch,
    "parametrization": negate,
}
LINEARS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"]


def check_effect(kit, inputs, change):
    model = kit.tiny()
    before = model(*inputs)
    change(model)
    out, expected = model(*inputs), kit.original(model, *inputs)
    assert (out - before).abs().max() > 1e-5 * before.abs().max()
    kit.close(out, expected, 2e-6)
    kit.close(kit.gradients(model, out, inputs[0]), kit.gradients(model, expected, inputs[0]), 1e-5)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("path", LINEARS)
def test_changed_linear_takes_effect(kit, inputs, path, change):
    parent, name = path.split(".")
    check_effect(kit, inputs, lambda model: CHANGES[change](model.blocks[1].get_submodule(parent), name))


@pytest.mark.parametrize("change", ["hook", "pre_hook", "patch"])
@pytest.mark.parametrize(
    "path", ["norm1", "norm2", "attn.q_norm", "mlp.act", "adaLN_modulation", "adaLN_modulation.0"]
)
def test_changed_module_takes_effect(kit, inputs, path, change):
    parent, _, name = path.rpartition(".")
    check_effect(kit, inputs, lambda model: CHANGES[change](model.blocks[1].get_submodule(parent), name))


@pytest.mark.parametrize(
    "path, module",
    [
        ("mlp.act", nn.ReLU()),
        ("mlp.act", nn.GELU()),
        ("norm1", nn.Identity()),
        ("norm2", nn.RMSNorm(32)),
        ("attn.k_norm", nn.LayerNorm(16, bias=False)),  # whose gradient would be zero up to rounding
        ("adaLN_modulation.0", nn.Tanh()),
        ("adaLN_modulation", nn.Sequential(nn.SiLU(), nn.Linear(32, 8), nn.Linear(8, 192))),
        ("mlp.fc2", nn.Linear(128, 32, bias=False)),
        ("mlp.fc1", nn.Linear(32, 128, bias=False)),
        ("attn.proj", nn.Linear(32, 32, bias=False)),
    ],
    ids=str,
)
def test_swapped_module_takes_effect(kit, inputs, path, module):
    parent, _, name = path.rpartition(".")
    check_effect(kit, inputs, lambda model: setattr(model.blocks[1].get_submodule(parent), name, module))


@pytest.mark.parametrize("path", ["x_embedder", "x_embedder.proj", "final_layer.norm_final", "final_layer.linear"])
@pytest.mark.parametrize("change", ["hook", "pre_hook", "patch"])
def test_change_outside_the_blocks_takes_effect(kit, inputs, path, change):
    parent, _, name = path.rpartition(".")
    check_effect(kit, inputs, lambda model: CHANGES[change](model.get_submodule(parent), name))


@pytest.mark.parametrize("path, kind", [("attn", Attention), ("mlp", Mlp)])
def test_branch_can_be_watched_and_replaced(kit, inputs, path, kind):
    model, shapes = kit.tiny(), []
    expected = model(*inputs)
    module = model.blocks[1].get_submodule(path)
    assert type(module) is kind
    handle = module.register_forward_hook(lambda m, args, out: shapes.append((len(args), out.shape)))
    kit.close(model(*inputs), expected, 2e-6)
    assert shapes == [(1, (3, 25, 32))]
    handle.remove()
    setattr(model.blocks[1], path, nn.Sequential(module, nn.Hardtanh(-0.1, 0.1)))
    clipped = model(*inputs)
    module.register_forward_hook(lambda m, args, out: out.clamp(-0.1, 0.1))
    setattr(model.blocks[1], path, module)
    kit.close(model(*inputs), clipped, 2e-6)
    assert (clipped - expected).abs().max() > 1e-3


@pytest.mark.parametrize("path", ["blocks.1", "final_layer"])
def test_hooks_of_a_layer_see_tokens(kit, inputs, path):
    model, calls = kit.tiny(), []
    expected, hidden = model(*inputs, return_hidden=[0, 1])
    model.get_submodule(path).register_forward_hook(lambda m, args, out: calls.append((args, out)))
    kit.close(model(*inputs), expected, 2e-6)
    ((args, out),) = calls
    assert len(args) == 2
    kit.close(args[0], hidden[0] if path == "blocks.1" else model.blocks[2](hidden[1], args[1]), 2e-6)
    if path == "blocks.1":
        kit.close(out, hidden[1], 2e-6)


def test_subclassed_and_foreign_blocks(kit, inputs):
    class Halved(DiTBlock):
        def forward(self, x, c):
            return super().forward(x, c) / 2

    class Shift(nn.Module):
        def forward(self, x, c):
            return x + c.unsqueeze(1)

    model = kit.tiny()
    expected = model(*inputs)
    model.blocks[1].register_forward_hook(lambda m, args, out: out / 2 + args[1].unsqueeze(1))
    expected = model(*inputs)
    halved = Halved(32, 2)
    halved.load_state_dict(model.blocks[1].state_dict())
    model.blocks[1] = halved
    model.blocks.insert(2, Shift())
    kit.close(model(*inputs), expected, 2e-6)


def test_global_hooks_see_every_module(kit, inputs):
    model, called = kit.tiny(), []
    expected = model(*inputs)
    handle = register_module_forward_hook(lambda module, args, out: called.append(module))
    try:
        kit.close(model(*inputs), expected, 2e-6)
    finally:
        handle.remove()
    missed = set(model.modules()) - set(called) - {model.blocks}
    assert {type(module) for module in missed} <= {nn.Dropout}  # attn_drop is an argument of PyTorch's attention


def test_tensor_subclasses_are_left_to_the_linear(kit, inputs):
    class Scaled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is nn.functional.linear:
                x, weight, *rest = args
                return function(x, 2 * weight.as_subclass(torch.Tensor), *rest)
            return super().__torch_function__(function, types, args, kwargs or {})

    model = kit.tiny()
    block = model.blocks[1]
    plain = [block.attn.proj.weight, block.mlp.fc1.weight, block.mlp.fc2.weight]
    for weight in plain:
        weight.data.mul_(2)
    expected = model(*inputs)
    for linear, weight in zip([block.attn.proj, block.mlp.fc1, block.mlp.fc2], plain, strict=True):
        linear.weight = nn.Parameter((weight.data / 2).as_subclass(Scaled))
    with record() as log:
        kit.close(model(*inputs), expected, 2e-6)
    assert len(log["mlp"]) == 2  # block 1 called its Linears


OPTIONS = (
    {},
    {"qk_norm": True},
    {"qk_norm": True, "norm_layer": nn.RMSNorm},
    {"proj_bias": False, "norm_layer": nn.RMSNorm},  # timm also accepts the norm without using it
    {"attn_drop": 0.5, "proj_drop": 0.5},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_block_options(kit, options):
    block = kit.fill(DiTBlock(32, 2, **options)).eval()
    x, c = kit.arr("tokens", (2, 5, 32)), kit.arr("c", (2, 32))
    kit.close(block(x, c), kit.original_block(block, x, c), 2e-6)
    assert (type(block.attn.q_norm) is nn.Identity) == (not options.get("qk_norm"))
    assert not options.get("qk_norm") or type(block.attn.k_norm) is options.get("norm_layer", nn.LayerNorm)
    assert (block.attn.proj.bias is None) == (options.get("proj_bias") is False)


@pytest.mark.parametrize("option", ["attn_drop", "proj_drop"])
def test_dropout_is_active_in_training(kit, option):
    block = kit.fill(DiTBlock(32, 2, **{option: 0.5}))
    x, c = kit.arr("tokens", (2, 5, 32)), kit.arr("c", (2, 32))
    torch.manual_seed(0)
    first, second = block(x, c), block(x, c)
    assert not torch.allclose(first, second)
    if option == "proj_drop":  # dropped after adding the bias: a dropped element leaves no trace
        with torch.no_grad():
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.bias.zero_()
        assert 0.4 < (block(x, c) == x).float().mean() < 0.6
