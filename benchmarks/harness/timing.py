"""Interleaved timing of several functions, so that changes of clock or load affect all equally."""

import random
import resource
import time

import numpy as np
import torch

from harness.errors import error_line

FLUSH_BYTES = 256 * 2**20  # several times any L2
LEAD_SECONDS = 1e-3  # at least
LEAD_MARGIN = 1.5  # times the Python time of the slowest function
CYCLES_PER_SECOND = 2e9  # at the highest clock; at a lower one, the lead is longer


def measure(functions: dict, repeats: int, device: str, warmup: int = 1, prepare=None, errors=None) -> dict:
    """{name: function} -> {name: {"median", "p10", "p90", "repeats"}} in ms; on a CPU also "faults".

    On a GPU, each run is enqueued while the GPU is still busy, so only GPU time counts. Faults are the pages that a
    run touched first, each of which the system had to clear.

    Args:
        prepare: called before each run, untimed.
        errors: collects {name: reason} for functions that fail, which are then skipped; without it they raise.
    """
    turns = Turns(functions, prepare or (lambda: None), errors)
    for _ in range(warmup):
        turns.run(lambda function: function())
    return _on_gpu(turns, repeats) if device == "cuda" else _on_cpu(turns, repeats)


class Turns:
    """The functions that have not failed so far, in a new order each turn: each pays for the caches before it."""

    def __init__(self, functions, prepare, errors):
        self.functions, self.prepare, self.errors = dict(functions), prepare, errors
        self.random = random.Random(0)

    def run(self, measure_one) -> dict:
        """{name: measure_one(function)} of one turn."""
        found = {}
        for name, function in self.random.sample(list(self.functions.items()), len(self.functions)):
            try:
                self.prepare()
                found[name] = measure_one(function)
            except Exception as error:
                if self.errors is None:
                    raise
                self.errors[name] = error_line(error)
                del self.functions[name]
        return found

    def repeat(self, measure_one, repeats) -> dict:
        """{name: [measure_one(function) of each turn]}."""
        turns = [self.run(measure_one) for _ in range(repeats)]
        return {name: [turn[name] for turn in turns] for name in self.functions}


def _on_cpu(turns, repeats):
    def run(function):
        before = _page_faults()
        return _host_ms(function), _page_faults() - before

    summaries = {}
    for name, runs in turns.repeat(run, repeats).items():
        times, faults = zip(*runs, strict=True)
        summaries[name] = _summary(times) | {"faults": float(np.median(faults))}
    return summaries


def _page_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _host_ms(function):
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def _on_gpu(turns, repeats):
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    cycles = _lead_cycles(turns)

    def record(function):
        flush.zero_()  # evicts inputs from L2
        torch.cuda._sleep(cycles)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        return start, end

    events = turns.repeat(record, repeats)
    torch.cuda.synchronize()
    return {name: _summary([start.elapsed_time(end) for start, end in pairs]) for name, pairs in events.items()}


def _lead_cycles(turns) -> int:
    """GPU cycles to sleep so that even the slowest function is enqueued in time."""

    def enqueue_ms(function):
        torch.cuda.synchronize()
        return _host_ms(function)

    slowest = max(turns.run(enqueue_ms).values(), default=0.0)
    return int(CYCLES_PER_SECOND * max(LEAD_SECONDS, LEAD_MARGIN * slowest / 1e3))


def _summary(times):
    p10, median, p90 = np.percentile(times, [10, 50, 90]).tolist()
    return {"median": median, "p10": p10, "p90": p90, "repeats": len(times)}
