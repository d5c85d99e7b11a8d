"""Solvers of dx/dt = f(t, x): Euler's and Heun's methods, and those of torchdiffeq."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TypeVar

import torch

from ditfast.flow import checks

State = TypeVar("State", torch.Tensor, tuple[torch.Tensor, ...])

OWN = ("euler", "heun2")
ADAPTIVE = ("adaptive_heun", "bosh3", "dopri5", "dopri8")
METHODS = (*OWN, "midpoint", "heun3", "rk4", *ADAPTIVE)  # with torchdiffeq's names


def check_method(method: str, own: Sequence[str] = OWN) -> None:
    """Check that a method exists and can run here; those in ``own`` do not need torchdiffeq.

    Raises:
        ValueError: an unknown name.
        ImportError: torchdiffeq is needed but missing.
    """
    checks.choice("sampling_method", method, METHODS)
    if method not in own:
        _torchdiffeq(method)


def call_times(method: str, times: Sequence[float]) -> list[float]:
    """The time of each call of f in `steps`."""
    return [t for start, end in pairwise(times) for t in ((start,) if method == "euler" else (start, end))]


def steps(
    method: str, f: Callable[[float, torch.Tensor], torch.Tensor], x: torch.Tensor, times: Sequence[float]
) -> Iterator[torch.Tensor]:
    """Yield x at each of ``times``, starting with the given x.

    Args:
        method: one of `OWN`.
        f: called as f(t, x).
        times: increasing or decreasing.
    """
    yield x
    for start, end in pairwise(times):
        dt, first = end - start, f(start, x)
        x = x + dt * first if method == "euler" else x + dt / 2 * (first + f(end, x + dt * first))
        yield x


def solve(method: str, f: Callable, state: State, times: Sequence[float], atol: float, rtol: float) -> State:
    """The state at all of ``times``, stacked along a new first dimension; by torchdiffeq.

    Args:
        f: called as f(t, state), with t a tensor (); returns the state's derivative.
        state: a tensor or a tuple of tensors.
    """
    x = state[0] if isinstance(state, tuple) else state
    at = torch.tensor(times, dtype=x.dtype, device=x.device)
    return _torchdiffeq(method).odeint(f, state, at, method=method, atol=atol, rtol=rtol)


def _torchdiffeq(method):
    try:
        import torchdiffeq
    except ImportError:
        raise ImportError(f"sampling_method {method!r} needs torchdiffeq: pip install 'ditfast[flow]'") from None
    return torchdiffeq
