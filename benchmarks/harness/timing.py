"""Times of several functions in turn, so that a change of clock or load meets all of them alike."""

import time

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20  # several times any L2
LEAD_CYCLES = 2_000_000  # about a millisecond, in which Python enqueues a whole backward


def measure(functions: dict, repeats: int, device: str, warmup: int = 1, prepare=None, lead: bool = False) -> dict:
    """{name: function} -> {name: {"median", "p10", "p90", "repeats"}} in ms.

    Args:
        prepare: called before each run, outside of its time.
        lead: keep the GPU busy until the run is enqueued, so that only the GPU's own time counts.
    """
    prepare = prepare or (lambda: None)
    for _ in range(warmup):
        for function in functions.values():
            prepare()
            function()
    found = _on_gpu(functions, repeats, prepare, lead) if device == "cuda" else _on_cpu(functions, repeats, prepare)
    return {name: _summary(times) for name, times in found.items()}


def _on_cpu(functions, repeats, prepare):
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            prepare()
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def _on_gpu(functions, repeats, prepare, lead):
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            prepare()
            flush.zero_()  # evicts inputs from L2, and lets the CPU run ahead before the clock starts
            if lead:
                torch.cuda._sleep(LEAD_CYCLES)
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
