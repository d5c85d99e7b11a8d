"""Times of several functions in turn, so that a change of clock or load meets all of them alike."""

import time

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20  # several times any L2


def measure(functions: dict, repeats: int, device: str, warmup: int = 1) -> dict:
    """{name: function} -> {name: {"median", "p10", "p90", "repeats"}} in ms."""
    for _ in range(warmup):
        for function in functions.values():
            function()
    sample = _on_gpu if device == "cuda" else _on_cpu
    return {name: _summary(times) for name, times in sample(functions, repeats).items()}


def _on_cpu(functions, repeats):
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _on_gpu(functions, repeats):
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            flush.zero_()  # evicts inputs from L2, and lets the CPU run ahead before the clock starts
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def _summary(times):
    p10, median, p90 = np.percentile(times, [10, 50, 90]).tolist()
    return {"median": median, "p10": p10, "p90": p90, "repeats": len(times)}
