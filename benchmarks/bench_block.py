"""Time DiT blocks in eager PyTorch, in torch.compile and in ditfast, side by side on the same weights and inputs.

    python benchmarks/bench_block.py                            # a full-size DiT-XL/2 block, on any machine
    python benchmarks/bench_block.py --model DiT-L/2 --batch 32 --dtype autocast --json out.json --plot out.png
    python benchmarks/bench_block.py --compare out.json --fail-below 0.95

No speed is printed for a case whose output or gradients miss their error budget. Exit status: 0; 1 after a parity
failure, or a case slower than --fail-below allows; 2 if the arguments, or the machines compared, do not fit.
"""

import json
import sys
from functools import partial
from importlib.util import find_spec

for package in ("torch", "ditfast", "rich"):
    if find_spec(package) is None:
        sys.exit(f"bench_block.py needs the package {package}, which is not installed: pip install -e '.[bench]'")

import compare  # noqa: E402
import interpreter  # noqa: E402
import memory  # noqa: E402
import options as command_line  # noqa: E402
import parity  # noqa: E402
import report  # noqa: E402
import timing  # noqa: E402
import torch  # noqa: E402
import variants  # noqa: E402
from machine import header, machine  # noqa: E402
from workload import RUN, forward_backward, make_blocks, make_gemms, make_inputs  # noqa: E402

from ditfast.ops import backend  # noqa: E402


class Bench:
    """One run: the stacks of all variants, and what they must compute."""

    def __init__(self, options):
        torch.compiler.reset()
        self.workload, self.repeats, self.notes = options.workload, options.repeats, []
        blocks, self.inputs = make_blocks(self.workload), make_inputs(self.workload)
        plain = variants.Stack(blocks)
        self.labels = parity.names(plain)
        self.low = forward_backward(plain, self.workload, self.inputs)
        self.ref = parity.reference(blocks, self.inputs)
        self.stacks = {}
        for name in options.variants:
            reason = variants.why_not(name)
            if reason:
                self.notes.append(f"{name} skipped: {reason}")
            else:
                self.stacks[name] = variants.build(name, self.workload, blocks, options.official_block)
        self.backends = {name: {} for name in self.stacks if name.startswith("ditfast")}

    def measure(self, mode):
        """The cases of one mode, and the ceiling: the stack's matrix products alone."""
        cases = {}
        for name in self.stacks:
            with report.busy(f"{name}, {report.MODES[mode]}: compute and compare"):
                cases[name] = self._check(name, mode)
        green = {name: self._pass(name, mode) for name, case in cases.items() if report.is_green(case)}
        gemms, gemm_flops = make_gemms(self.workload, mode)
        with report.busy(f"{report.MODES[mode]}: measure"):
            times = timing.measure(green | {"": gemms}, self.repeats, self.workload.device)
        ceiling = {"ms": times[""], "tflops": gemm_flops / times[""]["median"] / 1e9}
        for name in green:
            cases[name] |= self._speed(name, mode, times, ceiling)
        return list(cases.values()), ceiling

    def _pass(self, name, mode):
        return partial(RUN[mode], self.stacks[name], self.workload, self.inputs)

    def _check(self, name, mode):
        """Hold one variant to its error budget, and weigh it; this also compiles it."""
        case = {"variant": name, "mode": mode, "error": None, "parity": None, "ms": None, "kept_bytes": None}
        case["peak_bytes"] = None
        try:
            with backend.record() as ran:
                got = self._pass(name, mode)()
            case["parity"] = parity.compare(self.labels, got, self.low, self.ref)
            del got
            case["peak_bytes"] = memory.peak_bytes(self._pass(name, mode), self.workload.device)
            if mode == "fwd_bwd":
                case["kept_bytes"] = self._kept(name)
        except Exception as error:  # one variant that fails must not lose the others
            return case | {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        self._note_backends(name, ran)
        return case

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


def run(options) -> dict:
    bench = Bench(options)
    cases, ceiling = [], {}
    for mode in options.mode:
        found, ceiling[mode] = bench.measure(mode)
        cases += found
    for case in cases:
        kept = case["kept_bytes"]
        case["kept_units"] = None if kept is None else kept / options.workload.unit / options.workload.blocks
    result = {
        "schema": compare.SCHEMA,
        "header": header(options.workload.device),
        "workload": options.workload.as_dict(),
        "repeats": options.repeats,
        "cases": cases,
        "ceiling": ceiling,
        "kernels": None,
        "backends": bench.backends,
        "notes": bench.notes,
    }
    if options.workload.device == "cpu":
        result["kernels"] = prove_kernels(options.workload.dtype, result["notes"])
    return result


def prove_kernels(dtype, notes):
    """Parity of the Triton kernels in the interpreter; None, and a note, where there is no Triton."""
    if find_spec("triton") is None:
        notes.append("triton kernels not shown: triton is not installed")
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
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        report.plot(result, options.plot)
    checked = result["cases"] + ([result["kernels"]] if result["kernels"] else [])
    is_good = all(report.is_green(case) for case in checked)
    if options.old:
        is_good &= report.show_ratios(compare.ratios(options.old, result), options.fail_below)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
