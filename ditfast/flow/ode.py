"""Solvers of dx/dt = f(t, x): Euler's and Heun's methods, and those of torchdiffeq."""

from itertools import pairwise

import torch

from ditfast.flow import checks

OWN = ("euler", "heun2")
# torchdiffeq's names; the adaptive ones last
METHODS = (*OWN, "midpoint", "heun3", "rk4", "adaptive_heun", "bosh3", "dopri5", "dopri8")


def check_method(method, own=OWN) -> None:
    """Refuse a method that is none, or that cannot run here; ``own`` need no torchdiffeq.

    Raises:
        ValueError: an unknown name.
        ImportError: torchdiffeq is needed and missing.
    """
    checks.choice("sampling_method", method, METHODS)
    if method not in own:
        _torchdiffeq(method)


def call_times(method: str, times) -> list[float]:
    """When `steps` calls f, call by call."""
    return [t for start, end in pairwise(times) for t in ((start,) if method == "euler" else (start, end))]


def steps(method: str, f, x, times):
    """Yield x at each of ``times``, the first of which is where x is given.

    Args:
        method: one of `OWN`.
        f: called as f(t, x), t a number.
        times: numbers, rising or falling.
    """
    yield x
    for start, end in pairwise(times):
        dt, first = end - start, f(start, x)
        x = x + dt * first if method == "euler" else x + dt / 2 * (first + f(end, x + dt * first))
        yield x


def solve(method: str, f, state, times, atol: float, rtol: float):
    """The state, a tensor or a tuple of them, stacked at all of ``times``; by torchdiffeq.

    Args:
        f: called as f(t, state), t (); returns what the state has.
    """
    x = state[0] if isinstance(state, tuple) else state
    times = torch.tensor(times, dtype=x.dtype, device=x.device)
    return _torchdiffeq(method).odeint(f, state, times, method=method, atol=atol, rtol=rtol)


def _torchdiffeq(method):
    try:
        import torchdiffeq
    except ImportError:
        raise ImportError(f"sampling_method {method!r} needs torchdiffeq: pip install 'ditfast[flow]'") from None
    return torchdiffeq
