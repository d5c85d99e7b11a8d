"""Shared by the operations over token rows (B, N, D): their kernels' limits and test problems."""

from torch import Tensor

from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.availability import device_type, why_not_dtype
from ditfast.ops.backends.choice import choose
from ditfast.ops.op import Backend, Op, RandomTensors


def choose_for_rows(
    op: Op, requested: Backend, x: Tensor, y: Tensor | None, bias: Tensor | None, *modulation: Tensor
) -> str:
    """`choose`, except that per-token modulation goes to the reference unless the call names a backend."""
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


def _unsupported(per_token: bool, x: Tensor, *others) -> str | None:
    """Why the row kernels cannot take these tensors; None if they can."""
    if per_token:
        return "modulation of shape (B, N, D), one row per token, has no kernel"
    d = x.shape[-1]
    if d % 8 != 0 or d > 8192:
        return f"the kernels need D to be a multiple of 8, at most 8192, got {d}"
    return why_not_dtype(x, *others)


def random_modulation(t: RandomTensors, batch: int, dim: int, *names: str) -> dict[str, Tensor]:
    """Named rows of modulation (B, D): views of one (B, 6D) tensor, as adaLN makes them."""
    return dict(zip(names, t(batch, 6 * dim).chunk(6, dim=1), strict=False))


def random_residual(t: RandomTensors, batch: int, tokens: int, dim: int, *names: str) -> dict[str, Tensor]:
    """x, y (B, N, D), named rows of modulation, bias (D,): a residual stream and a branch to add to it."""
    x, y = t(batch, tokens, dim, stream=True, spread=3.0), t(batch, tokens, dim)
    return {"x": x, "y": y, **random_modulation(t, batch, dim, *names), "bias": t(dim, stream=True)}
