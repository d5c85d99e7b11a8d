"""A block of PyTorch's own operations: when it is used, that it computes the same, and that it raises every error."""

import pytest
import torch

from ditfast.models import DiTBlock, blocks, unfused
from ditfast.models.carry import set_pending, start_carry
from ditfast.ops.backends import choice
from ditfast.ops.backends.log import record


@pytest.fixture
def taken(monkeypatch):
    """Records one entry per block that ran this way."""
    calls, original = [], unfused._forward
    monkeypatch.setattr(unfused, "_forward", lambda *args: calls.append(1) or original(*args))
    return calls


@pytest.fixture
def problem(kit):
    """A block, and tokens and conditioning of two samples."""
    block = kit.fill(DiTBlock(32, 2))
    return block, kit.arr("tokens", (2, 5, 32)).requires_grad_(), kit.arr("c", (2, 32)).requires_grad_()


def run(block, x, c, name="auto"):
    with choice.use_backend(name):
        out = block(x, c)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weights).sum(), [x, c, *block.parameters()])]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_equals_the_reference(kit, problem, taken, dtype):
    block, x, c = (t.to(dtype) for t in problem)
    block.norm2.eps = 1e-3
    got = run(block, x, c)
    assert taken
    expected = run(block, x, c, "reference")
    for a, b in zip(got, expected, strict=True):
        kit.close(a, b, 5e-6)
    assert len(taken) == 1


def test_takes_another_blocks_pending_branch(kit, problem):
    block, x, c = problem
    y, gate, bias = kit.arr("y", (2, 5, 32)), kit.arr("gate", (2, 32)), kit.arr("bias", (32,))
    for b in (bias, None):
        outs = [block(set_pending(start_carry(x, c, (name,)), x, y, gate, b), c) for name in ("auto", "reference")]
        kit.close(outs[0].x, outs[1].x, 5e-6)


def test_a_model_runs_this_way_and_records_it(kit, taken):
    model, batch = kit.tiny(), kit.batch()
    with record() as ran:
        out = model(*batch)
    assert len(taken) == 3
    with choice.use_backend("reference"), record() as reference:
        kit.close(model(*batch), out, 2e-6)
    assert {op: len(names) for op, names in ran.items()} == {op: len(names) for op, names in reference.items()}
    assert set(ran["attention"]) == {"sdpa"} and set(ran["mlp"]) == {"reference"}


def large(block, monkeypatch):
    monkeypatch.setattr("ditfast.ops.backends.on_cpu.is_below", lambda *_: False)


def recomputing(block, monkeypatch):
    block.mlp.recompute = True


def repeated(block, monkeypatch):
    monkeypatch.setattr(choice, "_repeated", {"attention": "sdpa", "mlp": "host"})


def with_weights_in_a_norm(block, monkeypatch):
    block.norm1.weight = torch.nn.Parameter(torch.linspace(0, 2, 32))


def dropping(block, monkeypatch):
    block.attn.proj_drop.p = 0.5


def with_visible_weights(block, monkeypatch):
    block.attn.fused_attn = False


@pytest.mark.parametrize(
    "change", (large, recomputing, repeated, with_weights_in_a_norm, dropping, with_visible_weights)
)
def test_unusual_blocks_use_the_fused_operations(problem, taken, monkeypatch, change):
    block, x, c = problem
    change(block, monkeypatch)
    run(block, x, c)
    assert not taken


@pytest.mark.parametrize("here", (True, False))
def test_a_resumed_run_computes_as_before(problem, taken, monkeypatch, here):
    block, x, c = problem
    first = run(block, x, c)
    monkeypatch.setattr("ditfast.ops.backends.on_cpu.is_below", lambda *_: here)
    earlier = {"attention": "sdpa", "mlp": "reference", "gated_residual_layer_norm_modulate": "reference"}
    monkeypatch.setattr(choice, "_repeated", earlier)
    assert all(map(torch.equal, run(block, x, c), first)) and len(taken) == 2


def test_not_under_autocast_nor_by_name(problem, taken):
    block, x, c = problem
    with torch.autocast("cpu", torch.bfloat16):
        run(block, x, c)
    run(block, x, c, "reference")
    run(block, x, c, "host")
    assert not taken


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
def test_errors_equal_the_operations(problem, path, value, message):
    block, x, c = problem
    parent, _, name = path.rpartition(".")
    setattr(block.get_submodule(parent), name, torch.nn.Parameter(value) if torch.is_tensor(value) else value)
    with pytest.raises((TypeError, ValueError), match=message):
        block(x, c)


def test_a_projection_to_one_channel_is_not_stretched(problem):
    block, x, c = problem
    block.mlp.fc2 = torch.nn.Linear(128, 1)
    with pytest.raises(ValueError, match=r"y must have shape \(B, N, D\) = \(2, 5, 32\), got \(2, 5, 1\)"):
        block(x, c)


def test_the_parts_are_a_blocks():
    block = DiTBlock(32, 2)
    kinds = {name: type(part) for name, part in block.named_children()}
    assert kinds == blocks._PARTS
