"""Measure the variants of a stack of blocks: see bench_block.py."""

import sys
import time
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec

import torch

from ditfast import packed_weights
from ditfast.ops import contract
from ditfast.ops.backends.log import record
from harness import compare, compiling, jsonfile, resuming, timing
from harness.block import interpreter, memory, parity, report, variants
from harness.block import options as command_line
from harness.block.workload import RUN, forward_backward, make_blocks, make_gemms, make_inputs
from harness.errors import error_line, leave_if_gpu_is_lost
from harness.machine import header, machine
from harness.report import busy
from harness.verdicts import is_excused, is_green, is_ours, may_be_timed, passes

RESULTS = ("error", "parity", "ms", "kept_bytes", "kept_units", "peak_bytes")  # of a case


class Bench:
    """One run: the stacks of all variants and their expected results; weights stay packed in ``contexts``.

    Attributes:
        running: the variant under way, None between two.
    """

    def __init__(self, options, contexts, left_out):
        self.running = None
        torch.compiler.reset()
        self.workload, self.repeats, self.notes = options.workload, options.repeats, []
        blocks, self.inputs = make_blocks(self.workload), make_inputs(self.workload)
        plain = variants.Stack(blocks)
        self.labels = parity.names(plain)
        self.low = forward_backward(plain, self.workload, self.inputs)
        self.ref = parity.reference(blocks, self.inputs)
        self.stacks = {}
        for name in options.variants:
            if name in left_out:
                continue
            reason = variants.why_not(name)
            if reason:
                self.notes.append(f"{name} skipped: {reason}")
            else:
                self.stacks[name] = variants.build(name, self.workload, blocks, options.official_block)
        if variants.PACKED in self.stacks:
            contexts.enter_context(packed_weights(self.stacks[variants.PACKED]))
        self.backends = {name: {} for name in self.stacks if is_ours(name)}

    def measure(self, mode, end):
        """Yield the cases of one mode known so far, and the ceiling: the stack's matrix products alone.

        Args:
            end: no case starts after this time.
        """
        cases, verdicts, ceiling = {}, {}, None
        for names in self._rounds(mode, end):
            for name in names:
                if time.monotonic() > end:
                    self.notes.append(f"deadline: {name}, {report.MODES[mode]}, skipped")
                    continue
                self.running = name
                yield list(cases.values()), ceiling
                with busy(f"{name}, {report.MODES[mode]}: compute and compare"):
                    cases[name], verdicts[name] = self._check(name, mode)
                self._judge(cases, verdicts)
                self.running = None
                yield list(cases.values()), ceiling
            with busy(f"{report.MODES[mode]}: measure"):
                ceiling = self._time(mode, cases)
            yield list(cases.values()), ceiling
        self._note_excused(mode, cases)

    def _rounds(self, mode, end):
        """Groups of variants, timed group by group; with a deadline, what compiles longest comes last."""
        stacks = [name for name in self.stacks if mode == "fwd" or name != variants.PACKED]
        if end == float("inf"):
            return [stacks]
        groups = {}
        for name in stacks:
            groups.setdefault((name in variants.COMPILED) + (name == variants.TUNED), []).append(name)
        return [groups[key] for key in sorted(groups)]

    def _time(self, mode, cases):
        """Time all cases interleaved, fill in their speed, and return the ceiling."""
        runs = {name: self._pass(name, mode) for name, case in cases.items() if may_be_timed(case)}
        gemms, gemm_flops = make_gemms(self.workload, mode)
        errors = {}
        times = timing.measure(runs | {"": gemms}, self.repeats, self.workload.device, errors=errors)
        for name, why in errors.items():
            cases[name] |= {"error": why, "ms": None}
        ceiling = {"ms": times[""], "tflops": gemm_flops / times[""]["median"] / 1e9}
        for name in times.keys() & runs.keys():
            cases[name] |= self._speed(name, mode, times, ceiling)
        return ceiling

    def _pass(self, name, mode):
        return partial(RUN[mode], self.stacks[name], self.workload, self.inputs)

    def _check(self, name, mode):
        """Return a variant's case with its memory, and the verdict on each tensor; this also compiles it."""
        case = empty_case(name, mode)
        try:
            with record() as ran:
                got = self._pass(name, mode)()
            verdicts = parity.compare(self.labels, got, self.low, self.ref)
            del got
            case["peak_bytes"] = memory.peak_bytes(self._pass(name, mode), self.workload.device)
            if mode == "fwd_bwd":
                case["kept_bytes"] = kept = self._kept(name)
                case["kept_units"] = kept / self.workload.unit / self.workload.blocks
        except Exception as error:  # a failing variant must not lose the others
            return case | {"error": error_line(error)}, None
        self._note_backends(name, ran)
        return case, verdicts

    def _judge(self, cases, verdicts):
        """Record each case's worst tensor. Errors that compile shares are not ditfast's."""
        for name, found in verdicts.items():
            if found is None:
                continue
            if name == "ditfast+compile" and verdicts.get("compile"):
                found = parity.excused(found, verdicts["compile"])
            cases[name]["parity"] = contract.worst(found)

    def _note_excused(self, mode, cases):
        for name, case in cases.items():
            if is_excused(case):
                worst = case["parity"]
                used = f"{worst['tensor']} uses {worst['used']:.2f} of its error budget"
                self.notes.append(f"{name}, {report.MODES[mode]}: {used}, as does compile: the error is PyTorch's")

    def _kept(self, name):
        stack = self.stacks[name]

        def run():
            with self.workload.context():
                return stack(*self.inputs[:2])

        return memory.kept_bytes(run, stack.parameters())

    def _note_backends(self, name, ran):
        for op, names in ran.items():
            known = self.backends[name].setdefault(op, [])
            known += [n for n in dict.fromkeys(names) if n not in known]

    def _speed(self, name, mode, times, ceiling):
        w, ms = self.workload, times[name]
        tflops = w.flops(mode) / ms["median"] / 1e9
        return {
            "ms": ms,
            "tflops": tflops,
            "gmacs": w.macs(mode) / 1e9,
            "gemm_share": tflops / ceiling["tflops"],
            "speedup": {base: times[base]["median"] / ms["median"] for base in ("eager", "compile") if base in times},
        }


def empty_case(name, mode) -> dict:
    return {"variant": name, "mode": mode} | dict.fromkeys(RESULTS)


def lost_cases(before, modes) -> list[dict]:
    """Cases of the variants in which an earlier process failed or ended; if it was timing, of all of ditfast."""
    lost = {case["variant"]: case["error"] for case in before.get("cases", ()) if case["error"] is not None}
    if before.get("running"):
        lost.setdefault(before["running"], "its process ended")
    elif before and not lost:
        lost = dict.fromkeys(before["backends"], "its process ended")
    return [empty_case(name, mode) | {"error": why} for name, why in lost.items() for mode in modes]


def run(options) -> dict:
    with ExitStack() as contexts:
        return _run(options, contexts)


def _run(options, contexts):
    end, watch = time.monotonic() + (options.deadline or float("inf")), compiling.Watch()
    done = lost_cases(resuming.earlier(options), options.mode)
    bench, device = Bench(options, contexts, {case["variant"] for case in done}), options.workload.device
    result = {
        "schema": compare.SCHEMA,
        "header": header(device),
        "workload": options.workload.as_dict(),
        "repeats": options.repeats,
        "cases": done,
        "ceiling": {},
        "running": None,
        "kernels": None,
        "backends": bench.backends,
        "notes": bench.notes,
    }
    for mode in options.mode:
        for cases, ceiling in bench.measure(mode, end):
            result["cases"], result["running"] = done + cases, bench.running
            if ceiling:
                result["ceiling"][mode] = ceiling
            result["compiling"] = watch.result()
            jsonfile.write(options.json, result)
            leave_if_gpu_is_lost()
        done = result["cases"]
    result["header"] = header(device)
    if device == "cpu":
        result["kernels"] = prove_kernels(options.workload.dtype, result["notes"])
    jsonfile.write(options.json, result)
    return result


def prove_kernels(dtype, notes):
    """Parity of the Triton kernels in the interpreter; None and a note if Triton is not installed."""
    if find_spec("triton") is None:
        notes.append("Triton kernels were not checked: triton is not installed")
        return None
    return {"error": None} | interpreter.in_subprocess(dtype)


def main(argv=None) -> int:
    options = command_line.parse(argv)
    if options.old:
        try:
            compare.require_same(options.old, machine(options.workload.device), options.workload.as_dict())
        except compare.Incomparable as error:
            print(f"bench_block.py: cannot compare with {options.compare}: {error}", file=sys.stderr)
            return 2
    result = run(options)
    report.show(result)
    if options.plot:
        report.plot(result, options.plot)
    is_good = passes(result["cases"], options.variants) and (result["kernels"] is None or is_green(result["kernels"]))
    if options.old:
        is_good &= compare.show_ratios(compare.ratios(options.old, result), options.fail_below)
    return 0 if is_good else 1
