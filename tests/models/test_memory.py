"""Memory that a full-size block keeps for backward, in units of U = B * N * D * 2 bytes."""

import contextlib

import pytest
import torch

from ditfast.models import DiTBlock
from ditfast.models.carry import add_pending, start_carry
from ditfast.ops.backends.choice import use_backend

B, N, D, HEADS = 1, 256, 1152, 16


def kept(block, fn):
    """Bytes of unique storages saved while ``fn`` runs, except parameters and tensors with a parameter's shape."""
    shapes = {p.shape for p in block.parameters()} | {p.t().shape for p in block.parameters() if p.dim() == 2}
    sizes = {}

    def pack(t):
        if t.shape not in shapes:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        fn()
    return sum(sizes.values())


def units(dtype, autocast, recompute, backends):
    """U per block, from the difference between two stacks, so that the stack's ends do not count."""
    torch.manual_seed(0)
    block = DiTBlock(D, HEADS).to(dtype)
    block.mlp.recompute = recompute
    x, c = torch.randn(B, N, D, dtype=dtype, requires_grad=True), torch.randn(B, D, dtype=dtype)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    def stack(depth):
        def forward():
            carry = start_carry(x, c, backends)
            for _ in range(depth):
                carry = block(carry, c)
            forward.out = add_pending(carry).x  # kept alive, so that no storage address is reused

        with context:
            return kept(block, forward)

    return (stack(3) - stack(1)) / 2 / (B * N * D * 2)


@pytest.mark.parametrize(
    ("autocast", "recompute", "limit"),
    ((False, False, 18.2), (True, False, 20.5), (False, True, 14.2), (True, True, 16.5)),
    ids=("bf16", "autocast", "bf16-recompute", "autocast-recompute"),
)
def test_bytes_kept_for_backward(autocast, recompute, limit, monkeypatch):
    """With the kernels replaced by their formulas, because only the operations decide what is kept."""
    from importlib import import_module

    for name in ("layer_norm_modulate", "gated_residual", "junction", "mlp"):
        monkeypatch.setattr(import_module(f"ditfast.ops.{name}"), "resolve", lambda *_: "reference")
    dtype = torch.float32 if autocast else torch.bfloat16
    measured = units(dtype, autocast, recompute, ("host",))
    assert limit - 0.5 < measured <= limit


def test_the_plain_sequence_keeps_more():
    """The counter sees the fused operations' savings: without them, a block keeps more than 20 U."""
    with use_backend("reference"):
        assert units(torch.bfloat16, False, False, ("reference",)) > 20
