"""The fastest backend of an operation among those that are correct on this machine, found by timing them.

Decided once per (dtype, width, size class of N, training or inference) and device; the choice and its timings are
cached on disk with the self-check's results. Under ``torch.compile`` it is made while tracing, so that PyTorch's own
operation, if it wins, stays visible to the compiler.
"""

import statistics
import warnings
from collections.abc import Callable

import torch

from ditfast.ops.backends import cache, selfcheck
from ditfast.ops.backends.agreement import agreed
from ditfast.ops.backends.apart import run_apart
from ditfast.ops.backends.availability import why_not
from ditfast.ops.backends.choice import repeated_choice
from ditfast.ops.op import Op, RandomTensors

TOKENS = 16384  # of all samples together, in the timed problem
MARGIN = 0.95  # a kernel wins if it takes less than this share of PyTorch's time, or of the best kernel's so far
LARGEST = 4096  # size class of N
LEAD_CYCLES = 2_000_000  # about a millisecond, for Python to enqueue the timed work

_choices: dict[tuple, str] = {}


def size_class(tokens: int) -> int:
    """N rounded up to a power of two in [64, `LARGEST`]; the choice depends on N only through this."""
    return min(LARGEST, max(64, 1 << max(0, tokens - 1).bit_length()))


def fastest_backend(
    op: Op, make_run: Callable, dtype: torch.dtype, width: int, tokens: int, training: bool, device: torch.device
) -> str:
    """A kernel of ``op``, or PyTorch's own operation: always the latter if a CUDA graph is captured before a choice.

    Args:
        make_run: (`RandomTensors`, B, N, width, backend, training) -> a function that runs forward and, if training,
            backward.
        width: the self-check's width, i.e. the head dim.
    """
    repeated = repeated_choice(op)
    if repeated is not None and _is_usable(op, repeated, dtype, width, device):
        return repeated
    key = (op.name, dtype, width, size_class(tokens), training, device)
    return _choices.get(key) or _decide(op, make_run, key)


def label(op: Op, dtype: torch.dtype, width: int, tokens: int, training: bool) -> str:
    """Name of a choice on disk."""
    mode, size = "training" if training else "inference", size_class(tokens)
    bounds = f"N<={size}" if size < LARGEST else f"N>{size // 2}"
    return f"{op.name} {dtype} {width} {bounds} {mode}".replace("torch.", "")


def _decide(op, make_run, key) -> str:
    *problem, device = key[1:]
    name = label(op, *problem)
    if selfcheck.is_capturing(device) and cache.load(device).get(name) is None:
        selfcheck.warn_of_capture(name, "train or sample a step")
        return op.fallback
    choice = agreed(
        name,
        lambda: _answer(op, make_run, name, *problem, device),  # type: ignore[call-arg]  # problem is four values
        is_known=lambda: isinstance(cache.load(device).get(name), dict),
    )
    if why_not(op, choice, device.type) is not None:  # another rank has a backend that this rank lacks
        choice = op.fallback
    return _choices.setdefault(key, choice)


def _answer(op, make_run, name, dtype, width, tokens, training, device) -> str:
    """From disk if that choice was among the same backends; else by measurement."""
    kernels = [kernel for kernel in op.kernels if _is_usable(op, kernel, dtype, width, device)]
    candidates = (op.fallback, *kernels)
    known = cache.load(device).get(name)
    if isinstance(known, dict) and _is_choice(known, candidates):
        return known["choice"]
    if not kernels:
        return op.fallback  # not stored: a kernel that could not be checked is tried again
    try:
        problem = make_run, dtype, width, tokens, training, device
        us = {candidate: run_apart(device, measure, candidate, *problem) for candidate in candidates}
    except Exception as error:  # e.g. no memory left beside the model; the next process tries again
        warnings.warn(
            f"ditfast: {name} could not be timed, so it runs on {op.fallback}: {type(error).__name__}: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return op.fallback
    choice = op.fallback
    for kernel in kernels:
        if us[kernel] < MARGIN * us[choice]:
            choice = kernel
    cache.store(device, name, {"choice": choice, "us": us})
    return choice


def _is_choice(known, candidates) -> bool:
    """Whether a cache entry is a valid choice among these backends."""
    us = known.get("us")
    return isinstance(us, dict) and us.keys() == set(candidates) and known.get("choice") in candidates


def _is_usable(op, kernel, dtype, width, device):
    can_run = why_not(op, kernel, device.type) is None
    return can_run and selfcheck.is_right(op, kernel, dtype, dtype, width, device)


def measure(
    backend: str,
    make_run: Callable,
    dtype: torch.dtype,
    width: int,
    tokens: int,
    training: bool,
    device: torch.device,
) -> float:
    """Microseconds on the GPU: the median of 10 runs after 3 warm-ups."""
    t = RandomTensors((dtype, dtype), device)
    with torch.set_grad_enabled(training):
        run = make_run(t, max(1, TOKENS // tokens), tokens, width, backend, training)
        times = []
        for _ in range(13):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(LEAD_CYCLES)  # else this would time Python
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    return round(statistics.median(times[3:]), 1)
