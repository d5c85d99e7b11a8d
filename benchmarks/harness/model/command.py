"""Measure the variants of a whole model: see bench_model.py."""

import gc
import sys
import time
from contextlib import ExitStack, nullcontext

import torch

from ditfast.ops.backends.log import record
from harness import compare, compiling, jsonfile, timing, usage
from harness.errors import error_line
from harness.machine import header, machine
from harness.model import options as command_line
from harness.model import parity, report
from harness.model.sampling import make_run
from harness.model.training import make_step
from harness.model.variants import FP32, build, why_not
from harness.model.workload import MODES, make_inputs, make_model
from harness.report import busy
from harness.verdicts import is_ours, may_be_timed, passes

BASES = ("eager", FP32, "compile", "compile-frozen", "diffusers")  # baselines
EMPTY = ("error", "parity", "ms", "images_per_s", "tflops", "gemm_share", "peak_bytes", "pack_ms")


class Bench:
    """One run: a model, its inputs, and the cases of its variants."""

    def __init__(self, options):
        torch.compiler.reset()
        self.workload, self.repeats, self.variants = options.workload, options.repeats, options.variants
        self.notes, self.backends = [], {}
        self.model, self.inputs = make_model(self.workload), make_inputs(self.workload)

    def measure(self, mode):
        """The cases of one mode, and the ceiling: the blocks' matrix products alone."""
        cases, verdicts = {}, {}
        with busy(f"{MODES[mode]}: compute in float64"):
            truth = parity.Truth(mode, self.model, self.workload, self.inputs)
        for name in self.variants:
            reason = why_not(name, mode, self.workload.dtype)
            if reason:
                self.notes.append(f"{name}, {MODES[mode]}, skipped: {reason}")
                continue
            with busy(f"{name}, {MODES[mode]}: compute and compare"):
                cases[name] = self._check(name, mode, truth, verdicts)
        del truth
        gc.collect()
        with busy(f"{MODES[mode]}: measure"):
            ceiling = self._time(mode, cases)
        return list(cases.values()), ceiling

    def _check(self, name, mode, truth, verdicts):
        case = {"variant": name, "mode": mode, **dict.fromkeys(EMPTY), "speedup": {}}
        try:
            with record() as ran:
                got = parity.compute(name, mode, self.model, self.workload, self.inputs)
            excuse = verdicts.get("compile") if name == "ditfast+compile" else None
            case["parity"], verdicts[name] = truth.judge(got, excuse)
        except Exception as error:  # a failing variant must not lose the others
            return case | {"error": error_line(error)}
        if is_ours(name):
            known = self.backends.setdefault(name, {})
            known |= {op: sorted({*known.get(op, ()), *names}) for op, names in ran.items()}
        return case

    def _run(self, name, mode):
        """Returns (function that does the work of one case, number of steps it takes)."""
        model, w, inputs = self.model, self.workload, self.inputs
        if mode == "train":
            return _Call(make_step(name, model, w), inputs), 1
        if mode == "guided":
            return _Call(make_run(name, model, w), inputs), w.steps
        return _Call(_without_gradients(build(name, model), w), inputs), 1

    def _time(self, mode, cases):
        """Time all cases interleaved, fill in the results, and return the ceiling."""
        runs, errors = {}, {}
        for name, case in cases.items():
            if may_be_timed(case):
                runs[name], steps = self._run(name, mode)
        gemms, gemm_flops = self.workload.gemms(mode)
        with ExitStack() as ready:
            for name, run in runs.items():
                start = time.perf_counter()
                ready.enter_context(run.ready())
                if run.packs:
                    cases[name]["pack_ms"] = (time.perf_counter() - start) * 1e3
            times = timing.measure(runs | {"": gemms}, self.repeats, self.workload.device, errors=errors)
            peaks = {name: usage.peak_bytes(runs[name], self.workload.device) for name in times.keys() & runs.keys()}
        for name, why in errors.items():
            cases[name] |= {"error": why}
        rate = gemm_flops / times[""]["median"] / 1e9
        for name, peak in peaks.items():
            ms = {key: value / (1 if key == "repeats" else steps) for key, value in times[name].items()}
            cases[name] |= {**self._speed(mode, ms, rate), "peak_bytes": peak}
        for case in cases.values():
            medians = {b: cases[b]["ms"]["median"] for b in BASES if b in cases and cases[b]["ms"]}
            if case["ms"]:
                case["speedup"] = {b: ms / case["ms"]["median"] for b, ms in medians.items()}
        return {"ms": times[""], "tflops": rate}

    def _speed(self, mode, ms, rate):
        tflops = self.workload.flops(mode) / ms["median"] / 1e9
        images = self.workload.batch / ms["median"] * 1e3
        return {"ms": ms, "images_per_s": images, "tflops": tflops, "gemm_share": tflops / rate}


class _Call:
    def __init__(self, function, inputs):
        self.function, self.inputs = function, inputs
        self.packs = getattr(function, "packs", False)
        self.ready = getattr(function, "ready", nullcontext)

    def __call__(self):
        return self.function(*self.inputs)


def _without_gradients(model, workload):
    def forward(x, t, y):
        with torch.no_grad(), workload.context():
            return model(x, t, y)

    return forward


def run(options) -> dict:
    watch = compiling.Watch()
    bench, device = Bench(options), options.workload.device
    result = {
        "schema": compare.SCHEMA,
        "benchmark": "model",
        "header": header(device),
        "workload": options.workload.as_dict(),
        "repeats": options.repeats,
        "cases": [],
        "ceiling": {},
        "backends": bench.backends,
        "notes": bench.notes,
    }
    for mode in options.mode:
        cases, result["ceiling"][mode] = bench.measure(mode)
        result["cases"] += cases
        result["compiling"] = watch.result()
        jsonfile.write(options.json, result)
    result["header"] = header(device)
    jsonfile.write(options.json, result)
    return result


def main(argv=None) -> int:
    options = command_line.parse(argv)
    if options.old:
        try:
            compare.require_same(options.old, machine(options.workload.device), options.workload.as_dict())
        except compare.Incomparable as error:
            print(f"bench_model.py: cannot compare with {options.compare}: {error}", file=sys.stderr)
            return 2
    result = run(options)
    report.show(result)
    if options.plot:
        report.plot(result, options.plot)
    is_good = passes(result["cases"], options.variants)
    if options.old:
        is_good &= compare.show_ratios(compare.ratios(options.old, result), options.fail_below)
    return 0 if is_good else 1
