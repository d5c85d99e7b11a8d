"""What `patch` changes, what it leaves alone and reports, and how it is undone."""

import json
import pickle
import types
from copy import deepcopy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models import attention, normalization
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from ditfast.integrations.diffusers import basic, flux, known, norms, parts, patch, patching, sd3, unpatch
from ditfast.ops.backends.log import record

BLOCK = "transformer_blocks.0"
PARTS = ["FeedForward.forward", "GELU.gelu", "Attention.forward", "AttnProcessor2_0.__call__"]


def output(kit, model, name="dit"):
    with torch.no_grad():
        return model(**kit.inputs(name, model.dtype)).sample


def operations(kit, model, name="dit"):
    """Record the operations that run, each with the backends of its calls."""
    with record() as log:
        output(kit, model, name)
    return log


def refused(model, name=BLOCK):
    """Why a module is left alone."""
    report = patch(model)
    assert name not in report.patched and type(model.get_submodule(name)) not in patching._OURS
    return report.skipped[name]


def test_report(kit):
    report = patch(kit.make("sd35"))
    assert set(report.patched.values()) == {"JointTransformerBlock", "AdaLayerNormContinuous"}
    assert report.skipped["transformer_blocks.0.attn"] == "joint attention stays diffusers'"
    assert report.skipped["transformer_blocks.0.attn2"] == "it has norms or an output for another stream"
    lines = str(report).splitlines()
    assert lines[:4] == [
        "4 modules run on ditfast",
        "  3 x transformer_blocks.*  JointTransformerBlock",
        "  1 x norm_out              AdaLayerNormContinuous",
        "left to diffusers",
    ]
    assert any(line.startswith("  3 x transformer_blocks.*.attn ") for line in lines) and len(lines) < 12


def test_operations_that_run(kit):
    model = kit.make("dit")
    assert not operations(kit, model)
    patch(model, backend="host")
    once = ("layer_norm_modulate", "attention", "gated_residual_layer_norm_modulate", "mlp", "gated_residual")
    found = operations(kit, model)
    assert {name: found[name] for name in once} == dict.fromkeys(once, ["host"] * 2)  # two blocks
    patch(model, backend="reference")
    assert set(sum(operations(kit, model).values(), [])) == {"reference"}


def test_patching_twice_is_patching_once(kit):
    model = kit.make("flux")
    expected = output(kit, model, "flux")
    first = patch(model, backend="host")
    got = output(kit, model, "flux")
    assert patch(model, backend="host") == first
    assert torch.equal(output(kit, model, "flux"), got)
    unpatch(model)
    unpatch(model)
    assert torch.equal(output(kit, model, "flux"), expected)
    for module in model.modules():
        assert "ditfast" not in type(module).__module__ and not [key for key in vars(module) if "ditfast" in key]


def test_weights_and_files_are_unchanged(kit, tmp_path):
    model = kit.make("sd3")
    model.save_pretrained(tmp_path / "before")
    before, names = model.state_dict(), [name for name, _ in model.named_modules()]
    patch(model)
    after = model.state_dict()
    assert list(before) == list(after) and all(before[key].data_ptr() == after[key].data_ptr() for key in before)
    assert [name for name, _ in model.named_modules()] == names
    model.save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    assert json.loads((tmp_path / "after/config.json").read_text())["_class_name"] == "SD3Transformer2DModel"


def test_class_names_are_unchanged(kit):
    """diffusers uses class names to find blocks to compile, to offload and to keep on one device."""
    model = kit.make("flux")
    patch(model)
    classes = {type(module).__name__ for module in model.modules()}
    assert set(model._repeated_blocks) <= classes and set(model._no_split_modules) <= classes
    assert all(ours.__name__ == ours.theirs.__name__ for ours in patching._OURS)


def test_copies_are_patched_too(kit):
    model = kit.make("dit")
    expected = output(kit, model)
    patch(model, backend="host")
    got = output(kit, model)
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(kit, copy), got) and set(operations(kit, copy)["mlp"]) == {"host"}
        unpatch(copy)
        assert torch.equal(output(kit, copy), expected)
    assert operations(kit, model)


def test_a_pickle_loaded_with_another_diffusers(kit, monkeypatch):
    model = kit.make("dit", num_layers=1)
    expected = output(kit, model)
    patch(model)
    stored = pickle.dumps(model)
    monkeypatch.setitem(known.KNOWN, "BasicTransformerBlock.forward", "of another version")
    known.remember(attention.BasicTransformerBlock)
    try:
        with pytest.warns(UserWarning, match="a patched BasicTransformerBlock runs as diffusers': "):
            model = pickle.loads(stored)
        assert type(model.get_submodule(BLOCK)) is attention.BasicTransformerBlock
        assert torch.equal(output(kit, model), expected)
        assert "BasicTransformerBlock.forward of diffusers" in refused(model)
    finally:
        monkeypatch.undo()
        known.remember(attention.BasicTransformerBlock)
    assert BLOCK in patch(model).patched


@pytest.mark.parametrize("name", PARTS)
def test_parts_from_another_diffusers(name, monkeypatch):
    owner, method = name.split(".")
    cls = getattr(parts, owner)
    assert known.why_unknown(cls) is None
    monkeypatch.setattr(cls, method, lambda self, *a, **k: None)
    assert f"{name} of diffusers" in known.why_unknown(cls)


def test_every_known_fingerprint_is_used():
    """Every line of the table is used and matches the installed diffusers."""
    owners = {name.split(".")[0] for name in known.KNOWN}
    there = {}
    for module in (basic, flux, norms, parts, sd3, attention, normalization):
        there |= {name: getattr(value, "theirs", value) for name, value in vars(module).items() if name in owners}
    assert there.keys() == owners
    assert not [reason for reason in map(known.why_unknown, there.values()) if reason]


def test_fingerprint_covers_only_code():
    def function(x: int = 3) -> int:
        """Text."""
        return x + 1  # remark

    outline = known.fingerprint(function)

    def function(x=3):
        return (x +
                1)  # fmt: skip

    assert known.fingerprint(function) == outline

    def function(x=3):
        return x + 2

    assert known.fingerprint(function) != outline and known.fingerprint(len) == ""


def test_derived_classes_are_left_alone(kit):
    class Mine(attention.BasicTransformerBlock):
        def forward(self, hidden_states, **kwargs):
            return 2 * super().forward(hidden_states, **kwargs)

    model = kit.make("dit")
    model.get_submodule(BLOCK).__class__ = Mine
    expected = output(kit, model)
    assert refused(model) == "a Mine is derived from a known class and may do anything"
    assert type(model.get_submodule(f"{BLOCK}.norm1")) is normalization.AdaLayerNormZero  # it embeds timesteps
    torch.testing.assert_close(output(kit, model), expected)


def test_replaced_forwards_are_left_alone(kit, monkeypatch):
    model = kit.make("dit")
    block = model.get_submodule(BLOCK)
    block.forward = types.MethodType(attention.BasicTransformerBlock.forward, block)
    assert refused(model).startswith("its forward was replaced on the instance")
    del block.forward
    assert BLOCK in patch(model).patched
    original = attention.BasicTransformerBlock.forward
    monkeypatch.setattr(attention.BasicTransformerBlock, "forward", lambda *a, **k: 2 * original(*a, **k))
    assert not operations(kit, model)  # replaced since: every call goes where it would have gone
    unpatch(model)
    assert "BasicTransformerBlock.forward" in refused(model)


CHANGES = [  # change of a block, the part left to diffusers, and the start of the reason
    (lambda block: setattr(block, "_chunk_size", 1), "", "it embeds positions, attends"),
    (lambda block: setattr(block, "norm3", nn.LayerNorm(16)), "", "norm3 has parameters"),
    (lambda block: setattr(block.norm1, "norm", nn.Identity()), "", "norm1.norm is a Identity"),
    (lambda block: block.norm3.register_forward_hook(lambda *call: None), "", "norm3 has hooks"),
    (lambda block: block.attn1.set_processor(AttnProcessor()), ".attn1", "its processor is a AttnProcessor"),
    (lambda block: setattr(block.attn1, "rescale_output_factor", 2.0), ".attn1", "it adds its input"),
    (lambda block: setattr(block.attn1.to_k, "bias", None), ".attn1", "some of q, k and v have a bias"),
    (lambda block: setattr(block.attn1.to_out[1], "p", 0.5), ".attn1", "to_out.1 drops"),
    (lambda block: setattr(block.ff.net[1], "p", 0.5), ".ff", "net.1 drops"),
    (lambda block: setattr(block.ff.net[0], "approximate", "none"), ".ff", "net.0 is not a GELU"),
    (lambda block: setattr(block.ff.net[2], "forward", block.ff.net[2].forward), ".ff", "net.2 has hooks"),
]


@pytest.mark.parametrize("change, part, reason", CHANGES)
@pytest.mark.parametrize("is_before", [True, False])
def test_changes_keep_their_effect(kit, change, part, reason, is_before):
    """Changed before patching, and then listed, or after."""
    model = kit.make("dit", torch.float64).train()
    if is_before:
        change(model.get_submodule(BLOCK))
        assert patch(model, backend="reference").skipped[BLOCK + part].startswith(reason)
    else:
        patch(model, backend="reference")
        change(model.get_submodule(BLOCK))
    model.double()
    torch.manual_seed(0)  # of dropped labels
    got = output(kit, model)
    unpatch(model)
    torch.manual_seed(0)
    torch.testing.assert_close(got, output(kit, model), rtol=1e-10, atol=1e-10)


def test_hooks_see_the_calls(kit):
    model, seen = kit.make("dit"), []
    patch(model)
    for name in (BLOCK, f"{BLOCK}.attn1", f"{BLOCK}.attn1.to_q", f"{BLOCK}.ff", f"{BLOCK}.ff.net.1"):
        model.get_submodule(name).register_forward_hook(lambda module, *call, name=name: seen.append(name))
    output(kit, model)
    assert seen == [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1", f"{BLOCK}.ff.net.1", f"{BLOCK}.ff", BLOCK]


class Unknown(nn.Module):
    """An unknown model with known norms."""

    def __init__(self):
        super().__init__()
        self.zero = normalization.AdaLayerNormZero(16)
        self.single = nn.ModuleList([normalization.AdaLayerNormZeroSingle(16)])
        self.continuous = normalization.AdaLayerNormContinuous(16, 8, elementwise_affine=False, eps=1e-3)
        self.affine = normalization.AdaLayerNormContinuous(16, 8)
        self.fp32 = normalization.AdaLayerNormZero(16, norm_type="fp32_layer_norm")
        self.shared = normalization.AdaLayerNormContinuous(16, 8, elementwise_affine=False)
        self.linear = nn.Linear(16, 16)

    def forward(self, x, emb):
        h, gate, shift, scale, gate2 = self.zero(x, emb=emb)
        h2, gate3 = self.single[0](x, emb=emb)
        c = emb[:, :8]
        h = h * gate[:, None] + h2 * gate3[:, None] + self.linear(self.fp32(x, emb=emb)[0]) * gate2[:, None]
        return self.affine(self.continuous(h, c), c) + self.shared(x, c[:1]) * scale[:, None] + shift[:, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_known_norms_in_unknown_models(dtype):
    torch.manual_seed(0)
    model = Unknown().to(dtype)
    leaves = torch.randn(3, 7, 16, dtype=dtype).requires_grad_(), torch.randn(3, 16, dtype=dtype).requires_grad_()

    def results(autocast=False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(*leaves)
            tensors = out, *torch.autograd.grad(out.square().sum(), [*leaves, *model.parameters()], allow_unused=True)
        return [t for t in tensors if t is not None]

    expected, in_autocast = results(), results(dtype is torch.float32)
    report = patch(model, backend="reference" if dtype is torch.float64 else "host")
    assert set(report.patched) == {"zero", "single.0", "continuous", "shared"}
    assert report.skipped == {
        "affine": "its norm has parameters, or more than one dimension",
        "fp32": "its norm is a FP32LayerNorm",
        "linear": "a Linear is not a known block or norm",
    }
    limit = 1e-12 if dtype is torch.float64 else 1e-4
    for got, want in zip(results(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=limit, atol=limit * want.abs().max().item())
    for got, want in zip(results(dtype is torch.float32), in_autocast, strict=True):  # left to diffusers
        assert got.dtype == want.dtype and (dtype is torch.float64 or torch.equal(got, want))


def test_pipelines(kit):
    parts = {"transformer": kit.make("dit"), "vae": nn.Linear(2, 2), "scheduler": object(), "other": None}
    pipe = types.SimpleNamespace(components=parts)
    report = patch(pipe)
    assert set(report.patched) == {"transformer.transformer_blocks.0", "transformer.transformer_blocks.1"}
    assert "vae" not in report.skipped and "transformer.pos_embed" in report.skipped
    unpatch(pipe)
    assert type(parts["transformer"].get_submodule(BLOCK)) is attention.BasicTransformerBlock


def test_bad_arguments(kit):
    for call in (patch, unpatch):
        with pytest.raises(TypeError, match="model_or_pipe must be a diffusers model or pipeline, got int"):
            call(3)
    model = kit.make("dit")
    with pytest.raises(ValueError, match="backend must be one of auto, .*, got 'cudnn'"):
        patch(model, backend="cudnn")
    assert isinstance(model, DiTTransformer2DModel) and not operations(kit, model)


def test_unpatching_a_block_wrapped_later(kit):
    model = kit.make("dit")
    patch(model)
    block = model.get_submodule("transformer_blocks.1")
    block.forward = block.forward
    with pytest.raises(ValueError, match=r"transformer_blocks.1 was wrapped after patching"):
        unpatch(model)
    del block.forward
    block.__class__ = type("FSDPBlock", (type(block),), {})
    with pytest.raises(ValueError, match=r"transformer_blocks.1 was wrapped after patching"):
        unpatch(model)
    assert len(operations(kit, model)["mlp"]) == 2  # nothing was undone
