"""Layers after one check of everything: how they are run, that they compute the same, that every error comes."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ditfast import ops
from ditfast.models import DiTBlock, FinalLayer, blocks, unfused
from ditfast.models.carry import set_pending, start_carry
from ditfast.ops.backends import choice
from ditfast.ops.backends.log import record


@pytest.fixture
def taken(monkeypatch):
    """The name of each layer that was run so."""
    calls = []
    for name in ("run_block", "run_final"):
        run = getattr(unfused, name)
        monkeypatch.setattr(unfused, name, lambda *args, n=name, f=run: calls.append(n[4:]) or f(*args))
    return calls


@pytest.fixture(params=("block", "final"))
def problem(kit, request):
    """A layer, tokens and conditioning of two samples."""
    layer = kit.fill(DiTBlock(32, 2) if request.param == "block" else FinalLayer(32, 2, 3))
    return layer, kit.arr("tokens", (2, 5, 32)).requires_grad_(), kit.arr("c", (2, 32)).requires_grad_()


of_blocks = pytest.mark.parametrize("problem", ("block",), indirect=True)


def run(layer, x, c, name="auto"):
    with choice.use_backend(name):
        out = layer(x, c)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, c, *layer.parameters()])]


def last_norm(layer):
    return layer.norm2 if isinstance(layer, DiTBlock) else layer.norm_final


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equals_the_reference(kit, problem, taken, dtype):
    layer, x, c = (t.to(dtype) for t in problem)
    last_norm(layer).eps = 1e-3
    got = run(layer, x, c)
    assert taken
    expected = run(layer, x, c, "reference")
    for a, b in zip(got, expected, strict=True):
        kit.close(a, b, 5e-6)
    assert len(taken) == 1


def test_takes_what_another_block_left_pending(kit, problem):
    layer, x, c = problem
    y, gate, bias = kit.arr("y", (2, 5, 32)), kit.arr("gate", (2, 32)), kit.arr("bias", (32,))
    for b in (bias, None):
        outs = [layer(set_pending(start_carry(x, c, (name,)), x, y, gate, b), c) for name in ("auto", "reference")]
        kit.close(*(out.x if isinstance(layer, DiTBlock) else out for out in outs), 5e-6)


def test_a_model_runs_so_and_says_what_ran(kit, taken, monkeypatch):
    model, batch = kit.tiny(), kit.batch()
    with record() as ran, monkeypatch.context() as m:
        m.setattr(ops, "patch_embed", None)
        out = model(*batch)
    assert taken == ["block"] * 3 + ["final"]
    with choice.use_backend("reference"), record() as reference:
        kit.close(model(*batch), out, 2e-6)
    assert {op: len(names) for op, names in ran.items()} == {op: len(names) for op, names in reference.items()}
    assert set(ran["attention"]) == {"sdpa"} and set(ran["mlp"]) == {"reference"}


def large(layer, monkeypatch):
    monkeypatch.setattr("ditfast.ops.backends.on_cpu.is_below", lambda *_: False)


def repeated(layer, monkeypatch):
    earlier = {"attention": "sdpa", "gated_residual_layer_norm_modulate": "host"}
    monkeypatch.setattr(choice, "_repeated", earlier)


def with_weights_in_a_norm(layer, monkeypatch):
    last_norm(layer).weight = torch.nn.Parameter(torch.linspace(0, 2, 32))


def hooked(layer, monkeypatch):
    last_norm(layer).register_forward_hook(lambda *_: None)


def replaced(layer, monkeypatch):
    layer.adaLN_modulation[0] = torch.nn.Tanh()


def modulating_otherwise(layer, monkeypatch):
    monkeypatch.setattr("ditfast.models.carry.modulate", lambda x, shift, scale: x + shift.unsqueeze(1) * scale.sum())


def recomputing(block, monkeypatch):
    block.mlp.recompute = True


def dropping(block, monkeypatch):
    block.attn.proj_drop.p = 0.5


def with_visible_weights(block, monkeypatch):
    block.attn.fused_attn = False


OF_LAYERS = (large, repeated, with_weights_in_a_norm, hooked, replaced, modulating_otherwise)


@pytest.mark.parametrize("change", OF_LAYERS)
def test_what_is_not_as_usual_is_left_to_the_fused_operations(problem, taken, monkeypatch, change):
    layer, x, c = problem
    change(layer, monkeypatch)
    run(layer, x, c)
    assert not taken


@of_blocks
@pytest.mark.parametrize("change", (recomputing, dropping, with_visible_weights))
def test_a_block_that_is_not_as_usual(problem, taken, monkeypatch, change):
    test_what_is_not_as_usual_is_left_to_the_fused_operations(problem, taken, monkeypatch, change)


@pytest.mark.parametrize("here", (True, False))
def test_a_run_that_goes_on_computes_as_it_did(problem, taken, monkeypatch, here):
    layer, x, c = problem
    first = run(layer, x, c)
    monkeypatch.setattr("ditfast.ops.backends.on_cpu.is_below", lambda *_: here)
    earlier = {"attention": "sdpa", "mlp": "reference", "gated_residual_layer_norm_modulate": "reference"}
    monkeypatch.setattr(choice, "_repeated", earlier)
    assert all(map(torch.equal, run(layer, x, c), first)) and len(taken) == 2


def test_not_under_autocast_nor_by_name(problem, taken):
    layer, x, c = problem
    with torch.autocast("cpu", torch.bfloat16):
        run(layer, x, c)
        with torch.no_grad():
            layer(x, c)
    run(layer, x, c, "reference")
    run(layer, x, c, "host")
    assert not taken


@of_blocks
@pytest.mark.parametrize(
    "path, value, message",
    (
        (
            "attn.qkv.weight",
            torch.ones(96, 31),
            r"weight must have shape .* = \(96, 32\), got \(96, 31\)",
        ),
        ("mlp.fc1.bias", torch.ones(1), r"b1 must have shape \(F,\) = \(128,\), got \(1,\)"),
        ("attn.qkv.weight", torch.ones(96, 32).double(), "must have the dtype of h, torch.float32"),
        ("attn.qkv.weight", torch.ones(96, 32, device="meta"), "must be on the first argument's device, cpu"),
        ("norm1.eps", -1.0, "eps must be a finite number >= 0, got -1.0"),
        ("attn.scale", float("nan"), "scale must be a finite number or None, got nan"),
    ),
)
def test_errors_are_those_of_the_operations(problem, path, value, message):
    block, x, c = problem
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, torch.nn.Parameter(value) if torch.is_tensor(value) else value)
    with pytest.raises((TypeError, ValueError), match=message):
        block(x, c)


def test_tokens_of_another_dtype_are_not_promoted(problem):
    layer, x, c = problem
    with pytest.raises((TypeError, RuntimeError), match="dtype"):
        layer(x.bfloat16(), c)


@of_blocks
@pytest.mark.parametrize("of", ("gate", "bias", "adaLN_modulation.1.bias", "mlp.fc2.weight"))
def test_mixed_dtypes_are_left_to_the_operations(kit, problem, taken, of):
    block, x, c = problem
    y, gate, bias = kit.arr("y", (2, 5, 32)), kit.arr("gate", (2, 32)), kit.arr("bias", (32,))
    carry = set_pending(start_carry(x, c, ("auto",)), x, y, gate, bias)
    if "." in of:
        module, _, name = of.rpartition(".")
        setattr(block.get_submodule(module), name, torch.nn.Parameter(block.get_parameter(of).double()))
        with pytest.raises((TypeError, RuntimeError), match="dtype"):
            block(carry, c)
    else:
        block(carry._replace(**{of: getattr(carry, of).bfloat16()}), c)
    assert not taken


def test_errors_of_a_users_hooks_are_not_swallowed(problem, taken):
    """Such as that of an offloading hook out of memory."""
    layer, x, c = problem
    seen = []

    def pack(t):
        seen.append(t)
        if len(seen) == 4:
            raise RuntimeError("no host memory left")
        return t

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, pytest.raises(RuntimeError, match="no host memory left"):
        layer(x, c)
    assert taken and len(seen) == 4


def test_errors_of_a_users_mode_in_the_embedding(kit):
    class Refusing(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is torch.conv2d:
                seen.append(function)
                raise RuntimeError("over budget")
            return function(*args, **(kwargs or {}))

    model, batch, seen = kit.tiny(depth=0), kit.batch(), []
    with Refusing(), pytest.raises(RuntimeError, match="over budget"):
        model(*batch)
    assert len(seen) == 1


@of_blocks
def test_a_projection_to_one_channel_is_not_stretched(problem):
    block, x, c = problem
    block.mlp.fc2 = torch.nn.Linear(128, 1)
    with pytest.raises(ValueError, match=r"y must have shape \(B, N, D\) = \(2, 5, 32\), got \(2, 5, 1\)"):
        block(x, c)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"pos_embed": torch.ones(1, 25, 1)}, r"pos_embed must have shape \(1, N, D\) = \(1, 25, 32\)"),
        ({"x_embedder.proj.weight": torch.ones(32, 4, 1, 1)}, r"weight must have shape .* = \(32, 4, 2, 2\)"),
        ({"pos_embed": torch.ones(1, 25, 32).int()}, "pos_embed must be float32, .* got torch.int32"),
        ({"x_embedder.proj.bias": torch.ones(1)}, r"bias must have shape \(D,\) = \(32,\)"),
        ({"x_embedder.proj.bias": torch.ones(32).double()}, "bias must have the dtype of x, torch.float32"),
    ),
)
def test_errors_are_those_of_the_embedding(kit, change, message):
    model = kit.tiny(depth=0)
    for path, value in change.items():
        model.get_parameter(path).data = value
    with pytest.raises((TypeError, ValueError), match=message):
        model(*kit.batch())


def test_an_image_of_another_size_is_not_cut_off(kit):
    with pytest.raises(ValueError, match="x must have H and W divisible by patch_size=2"):
        kit.tiny(depth=0).embed_patches(kit.arr("image", (3, 4, 11, 10)), ("auto",))


def test_the_parts_are_those_of_a_layer():
    for layer, parts in ((DiTBlock(32, 2), blocks._PARTS), (FinalLayer(32, 2, 3), blocks._FINAL_PARTS)):
        assert {name: type(part) for name, part in layer.named_children()} == parts
