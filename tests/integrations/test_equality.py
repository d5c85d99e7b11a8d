"""A patched diffusers model computes the same: outputs, and gradients of inputs and of every weight."""

from copy import deepcopy

import pytest
import torch
from contract import assert_contract
from diffusers.models.controlnets import SD3ControlNetModel
from torch import nn

from ditfast.integrations.diffusers import patch, unpatch

MODELS = ["dit", "pixart", "sd3", "sd35", "flux"]


def is_zero(name):
    """Whether a gradient is zero up to rounding: softmax ignores what is added to all logits."""
    return name.endswith(("to_k.bias", "add_k_proj.bias"))


def assert_close(got, expected, limit):
    """Compare every tensor to a relative error, except those that are zero."""
    assert got.keys() == expected.keys()
    for name in got:
        error, size = (got[name] - expected[name]).abs().max(), expected[name].abs().max()
        assert is_zero(name) or error <= limit * size, f"{name}: {error:.3g} of {size:.3g}"


def stacked(tensors, ref):
    """All gradients in one vector, each scaled by its norm: errors of single small ones are mere chance."""
    names = [name for name in ref if name != "out" and not is_zero(name)]
    return torch.cat([tensors[name].double().flatten() / (ref[name].norm() or 1) for name in names]).to(
        tensors["out"].dtype
    )


def assert_as_good(got, low, ref):
    assert got.keys() == low.keys() == ref.keys()
    assert_contract("out", got["out"], low["out"], ref["out"])
    assert_contract("gradients", *(stacked(t, ref) for t in (got, low, ref)), per_sample=False)


@pytest.mark.parametrize("name", MODELS)
def test_the_formulas_are_equal(kit, name):
    """In float64, where rounding cannot hide a wrong term."""
    model = kit.make(name, torch.float64)
    expected = kit.run(model, kit.inputs(name, torch.float64))
    patch(model, backend="reference")
    assert_close(kit.run(model, kit.inputs(name, torch.float64)), expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_contract(kit, name, dtype):
    model = kit.make(name, dtype)
    ref = kit.run(deepcopy(model).double(), kit.inputs(name, torch.float64))
    low = kit.run(model, kit.inputs(name, dtype))
    for backend in ("reference", "host", None):
        assert patch(model, backend=backend).patched
        assert_as_good(kit.run(model, kit.inputs(name, dtype)), low, ref)
    unpatch(model)
    again = kit.run(model, kit.inputs(name, dtype))
    assert all(torch.equal(again[key], low[key]) for key in low)


@pytest.mark.parametrize("name", MODELS)
def test_autocast(kit, name):
    """The stream's dtype changes in the same places as in diffusers."""
    model, dtypes = kit.make(name), []
    ref = kit.run(deepcopy(model).double(), kit.inputs(name, torch.float64))
    block = next(module for module in model.modules() if "TransformerBlock" in type(module).__name__)
    block.register_forward_hook(lambda *call: dtypes.append([t.dtype for t in call[-1]]))
    results = []
    for backend in (None, "reference", "host"):
        if backend is not None:
            patch(model, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(kit.run(model, kit.inputs(name)))
    low, *patched = results
    for got in patched:
        assert_as_good(got, low, ref)
    assert dtypes[0] == dtypes[1] == dtypes[2]


def test_one_sample_and_odd_sizes(kit):
    model = kit.make("dit", torch.float64, num_attention_heads=3, attention_head_dim=4, num_layers=1)  # D = 12
    arguments = kit.inputs("dit", torch.float64)
    arguments = {key: value[:1].detach() for key, value in arguments.items()} | {"timestep": torch.tensor([7])}
    expected = model(**arguments).sample
    patch(model)
    torch.testing.assert_close(model(**arguments).sample, expected, rtol=1e-12, atol=1e-12)


class WithAdapter(nn.Module):
    """A Flux block's attention with the third output that an IP adapter adds."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, ip_scale, **arguments):
        y, context = self.attn(**arguments)
        return y, context, ip_scale * y


def test_flux_with_an_ip_adapter(kit):
    model = kit.make("flux", torch.float64, num_layers=1)
    block = model.transformer_blocks[0]
    block.attn = WithAdapter(block.attn)
    rows = torch.randn(3, 16, dtype=torch.float64)
    x, text = torch.randn(3, 7, 16).double(), torch.randn(3, 5, 16).double()
    expected = block(x, text, rows, None, {"ip_scale": 0.5})
    patch(model, backend="reference")
    for got, want in zip(block(x, text, rows, None, {"ip_scale": 0.5}), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_flux_in_float16_stays_finite(kit):
    """Flux's blocks clip what float16 cannot hold."""
    model = kit.make("flux", torch.float16)
    with torch.no_grad():
        model.single_transformer_blocks[0].proj_out.weight *= 3e4
        expected = model(**kit.inputs("flux", torch.float16)).sample
        assert expected.isfinite().all()
        patch(model, backend="reference")
        assert model(**kit.inputs("flux", torch.float16)).sample.isfinite().all()


def test_sd3_block_of_one_stream(kit):
    """As in the ControlNet for SD3.5."""
    config = dict(num_layers=2, sample_size=8, in_channels=4, attention_head_dim=8, num_attention_heads=2)
    config |= dict(caption_projection_dim=16, pooled_projection_dim=10, pos_embed_max_size=8, pos_embed_type=None)
    model = SD3ControlNetModel(**config, joint_attention_dim=None, extra_conditioning_channels=1, use_pos_embed=False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    model.double()
    x = torch.randn(3, 16, 16, dtype=torch.float64)
    rest = torch.randn(3, 5, 8, 8).double(), torch.randn(3, 10).double(), torch.tensor([1, 50, 999])
    arguments = {"hidden_states": x, "controlnet_cond": rest[0], "pooled_projections": rest[1], "timestep": rest[2]}
    expected = model(**arguments, return_dict=False)[0]
    report = patch(model, backend="reference")
    assert report.patched["transformer_blocks.1"] == "SD3SingleTransformerBlock"
    for got, want in zip(model(**arguments, return_dict=False)[0], expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


class Lora(nn.Module):
    """A Linear with a low-rank update, as adapters wrap one."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def add_lora(model, block):
    """Add one to every kind of Linear in a block of any of the models."""
    torch.manual_seed(0)
    attention, mlp = ("attn1.to_q", "attn1.to_out.0", "attn.to_v"), ("ff.net.2", "ff.net.0.proj", "proj_out")
    for path in (*attention, *mlp, "norm1.linear", "norm.linear"):
        parent, _, name = path.rpartition(".")
        try:
            owner = block.get_submodule(parent)
            setattr(owner, name, Lora(getattr(owner, name)).to(model.dtype))
        except AttributeError:
            continue


@pytest.mark.parametrize("name", MODELS)
def test_adapters_added_before_and_after(kit, name):
    model = kit.make(name, torch.float64)
    blocks = [module for module in model.modules() if "TransformerBlock" in type(module).__name__]
    bare = kit.run(model, kit.inputs(name, torch.float64))["out"]
    add_lora(model, blocks[0])
    patch(model, backend="reference")
    add_lora(model, blocks[-1])
    got = kit.run(model, kit.inputs(name, torch.float64))
    unpatch(model)
    expected = kit.run(model, kit.inputs(name, torch.float64))
    assert (expected["out"] - bare).abs().max() > 1e-2
    assert sum(".up." in key or ".down." in key for key in got) >= 8
    assert_close(got, expected, 1e-11)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_peft(kit, name):
    peft = pytest.importorskip("peft")
    model = kit.make(name)
    patch(model, backend="host")
    targets = ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "proj_out", "norm1.linear"]
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    if name == "flux":
        model.add_adapter(config)
    else:
        peft.inject_adapter_in_model(config, model)
    got = kit.run(model, kit.inputs(name))
    assert any("lora" in key for key in got)
    unpatch(model)
    assert_close(got, kit.run(model, kit.inputs(name)), 2e-4)


@pytest.mark.parametrize("name", ["dit", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS[1:])])
def test_compiled(kit, name):
    model = kit.make(name)
    patch(model, backend="host")
    expected = kit.run(model, kit.inputs(name))
    torch.compiler.reset()
    got = kit.run(torch.compile(model, fullgraph=True, backend="aot_eager"), kit.inputs(name))
    torch.compiler.reset()
    assert_close({key.removeprefix("_orig_mod."): value for key, value in got.items()}, expected, 2e-4)


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_checkpointed(kit, name):
    model = kit.make(name).train()
    torch.manual_seed(3)  # of dropped labels
    expected = kit.run(model, kit.inputs(name))
    patch(model, backend="host")
    model.enable_gradient_checkpointing()
    torch.manual_seed(3)
    assert_close(kit.run(model, kit.inputs(name)), expected, 2e-4)
