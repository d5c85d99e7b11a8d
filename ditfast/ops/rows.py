"""What the operations over token rows (B, N, D) share: the limits of their kernels, and the tensors of a problem."""

import torch

from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.availability import device_type, why_not_dtype
from ditfast.ops.backends.choice import choose
from ditfast.ops.op import Op


def choose_for_rows(op: Op, requested, x, y, bias, *modulation) -> str:
    """`choose`, where one row of modulation per token goes to the reference, unless the call names another."""
    per_token = False
    for m in modulation:
        per_token = per_token or m.dim() == 3
    if per_token and not isinstance(requested, str):
        return "reference"

    def takes_host(is_able):
        return on_cpu.takes_host(op, x.dtype, modulation[-1].dtype, x.shape[-1], x.numel(), is_able)

    return choose(
        op, requested, device_type(x), lambda name: _unsupported(per_token, x, y, bias, *modulation), takes_host
    )


def _unsupported(per_token: bool, x: torch.Tensor, *others) -> str | None:
    """Why the row kernels cannot take these tensors; None if they can."""
    if per_token:
        return "modulation of shape (B, N, D), one row per token, has no kernel"
    d = x.shape[-1]
    if d % 8 != 0 or d > 8192:
        return f"the kernels need D to be a multiple of 8, at most 8192, got {d}"
    return why_not_dtype(x, *others)


def random_modulation(t, batch: int, dim: int, *names: str) -> dict[str, torch.Tensor]:
    """Rows of modulation (B, D) by name for a problem: views of one (B, 6D) tensor, as adaLN makes them."""
    return dict(zip(names, t(batch, 6 * dim).chunk(6, dim=1), strict=False))


def random_residual(t, batch: int, tokens: int, dim: int, *names: str) -> dict[str, torch.Tensor]:
    """x, y (B, N, D), rows of modulation by name, bias (D,): a residual stream and a branch to be added to it."""
    x, y = t(batch, tokens, dim, stream=True, spread=3.0), t(batch, tokens, dim)
    return {"x": x, "y": y, **random_modulation(t, batch, dim, *names), "bias": t(dim, stream=True)}
