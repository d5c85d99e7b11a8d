"""Of an operation's backends the fastest, among those that are right on this machine, by measurement.

Asked once per (dtype, width, class of N) and device; the answer and its times are kept on disk with those of the
self-check. Under ``torch.compile`` the question is asked while tracing, so that PyTorch's own operation, where it
wins, stays visible to the compiler.
"""

import statistics
from collections.abc import Callable

import torch

from ditfast.ops.backends import cache, selfcheck
from ditfast.ops.backends.availability import why_not
from ditfast.ops.op import Op, RandomTensors

TOKENS = 16384  # of all samples of the problem that is timed

_choices: dict[tuple, str] = {}


def size_class(tokens: int) -> int:
    """N rounded up to a power of two, at least 64 and at most 4096: what the choice depends on."""
    return min(4096, max(64, 1 << max(0, tokens - 1).bit_length()))


def fastest_backend(op: Op, to_time: Callable, dtype, width: int, tokens: int, device: torch.device) -> str:
    """A kernel of ``op``, or PyTorch's own; that while a CUDA graph is captured and the answer is not known.

    Args:
        to_time: (`RandomTensors`, B, N, width, backend) -> a function that runs forward and backward.
        width: what the self-check asks for, the head dim.
    """
    key = (op.name, dtype, width, size_class(tokens), device)
    return _choices.get(key) or _decide(op, to_time, key)


def label(op: Op, dtype, width, tokens) -> str:
    """Name of a choice on disk."""
    return f"{op.name} {dtype} {width} N<={size_class(tokens)}".replace("torch.", "")


def _decide(op, to_time, key) -> str:
    _, dtype, width, tokens, device = key
    name = label(op, dtype, width, tokens)
    known = cache.load(device).get(name)
    if known is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return op.fallback
        known = {"choice": op.fallback, "us": {}}
        kernels = [kernel for kernel in op.kernels if _is_able(op, kernel, dtype, width, device)]
        if kernels:
            known["us"] = {c: measure(c, to_time, dtype, width, tokens, device) for c in (*kernels, op.fallback)}
            known["choice"] = min(known["us"], key=known["us"].get)
        cache.store(device, name, known)
    return _choices.setdefault(key, known["choice"])


def _is_able(op, kernel, dtype, width, device):
    can_run = why_not(op, kernel, device.type) is None
    return can_run and selfcheck.is_right(op, kernel, dtype, dtype, width, device)


def measure(backend: str, to_time, dtype, width, tokens, device) -> float:
    """Microseconds of forward and backward, the median of 10 after 3 to warm up."""
    t = RandomTensors((dtype, dtype), device)
    plain = torch.autocast(device.type, enabled=False)
    with selfcheck.on_device(device), torch.enable_grad(), torch.inference_mode(False), plain:
        run = to_time(t, max(1, TOKENS // tokens), tokens, width, backend)
        times = []
        for _ in range(13):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    return round(statistics.median(times[3:]), 1)
