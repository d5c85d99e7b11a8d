"""Measure attention in ditfast and other libraries: see bench_attention.py."""

from functools import partial
from itertools import product
from pathlib import Path

import torch

from ditfast.ops.attention import heads_of
from harness import jsonfile, resuming, timing
from harness.arguments import Parser, count, require_writable
from harness.attention import report
from harness.attention.implementations import implementations, kernels_seen
from harness.ceilings import copy_gb_per_s, gemm_tflops
from harness.errors import error_line
from harness.machine import header
from harness.problems import Problem, judge
from harness.verdicts import is_ours, may_be_timed, passes

MODES = ("fwd", "bwd", "both")
HEADS = 16
DEFAULTS = {  # (device, quick): tokens, head dims, total, dtypes, repeats, size of the GEMM; most important first
    ("cuda", False): ([256, 1024, 64, 4096], [72, 64], 16384, ["bf16", "fp16"], 30, 8192),
    ("cuda", True): ([64, 256], [72, 64], 512, ["bf16"], 3, 1024),
    ("cpu", False): ([64, 256], [72, 64], 256, ["fp32"], 3, 256),
    ("cpu", True): ([16, 64], [72, 64], 64, ["fp32"], 2, 128),
}


def parse(argv):
    parser = Parser(prog="bench_attention.py", description="Time attention in ditfast and other libraries.")
    add = parser.add_argument
    add("--tokens", nargs="+", type=count, metavar="N", help="tokens per sample (default 256 1024 64 4096)")
    add("--head-dims", nargs="+", type=int, choices=(64, 72), help="default both")
    add("--total", type=count, metavar="N", help="tokens of the whole batch (default 16384)")
    add("--dtypes", nargs="+", choices=("bf16", "fp16", "fp32"), help="default bf16 fp16; fp32 on a CPU")
    add("--repeats", type=count, metavar="N", help="timed runs per case (default 30)")
    add("--quick", action="store_true", help="smoke test: tiny shapes, few repeats")
    add("--deadline", type=count, metavar="SECONDS", help="start no case after this; report how many were skipped")
    add("--json", type=Path, metavar="FILE", help="write all results, case by case")
    resuming.add_option(parser)
    add("--plot", type=Path, metavar="FILE", help="plot TFLOP/s of every implementation")
    options = parser.parse_args(argv)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("tokens", "head_dims", "total", "dtypes", "repeats")
    *defaults, options.gemm = DEFAULTS[options.device, options.quick]
    for name, default in zip(names, defaults, strict=True):
        setattr(options, name, getattr(options, name) or default)
    try:
        require_writable(options)
    except ValueError as error:
        parser.error(error)
    return options


def executed_flops(mode: str, batch: int, tokens: int, heads: int, head_dim: int) -> int:
    """FLOPs, two per multiply-add, at the true head dim: 2 products forward, 5 backward, which recomputes one."""
    products = {"fwd": 2, "bwd": 5, "both": 7}[mode]
    return products * 2 * batch * heads * tokens * tokens * head_dim


class Bench:
    """One size: check every peer against the contract, then time all of them interleaved."""

    def __init__(self, problem, options, ceiling):
        self.problem, self.options, self.ceiling = problem, options, ceiling
        self.heads = heads_of(problem.dim)
        self.head_dim = problem.dim // self.heads
        self.leaf = problem.inputs()[0]
        self.grad = problem.grads([problem.call(self.leaf.detach(), backend="sdpa")[0]])[0]

    def cases(self) -> list[dict]:
        low = self.problem.results("reference")
        ref = self.problem.reference(low)
        functions = implementations(self.options.device)
        verdicts = {name: self._verdict(function, low, ref) for name, function in functions.items()}
        del low, ref
        return [case for mode in MODES for case in self._mode(mode, functions, verdicts)]

    def _verdict(self, function, low, ref):
        try:
            got = self.problem.results(None, lambda qkv: (function(qkv, self.heads),))
            return judge(self.problem, got, low, ref)
        except Exception as error:  # a failing peer must not lose the others
            return error_line(error)

    def _mode(self, mode, functions, verdicts):
        cases = {name: self._case(name, mode, verdicts[name]) for name in functions}
        runs = {n: self._pass(mode, functions[n]) for n, c in cases.items() if may_be_timed(c)}
        errors = {}
        times = timing.measure(runs, self.options.repeats, self.options.device, warmup=3, errors=errors)
        best = min((times[n]["median"] for n in times if not is_ours(n)), default=None)
        for name in times:
            cases[name] |= self._speed(mode, times[name], best)
            cases[name]["kernels"] = kernels_seen(runs[name], self.options.device)
        for name, why in errors.items():
            cases[name]["error"] = why
        return cases.values()

    def _case(self, name, mode, verdict):
        p, failed = self.problem, isinstance(verdict, str)
        parity = None
        if not failed:
            parity = verdict["fwd" if mode == "fwd" else "bwd"]
            if mode == "both" and verdict["fwd"]["reason"]:
                parity = verdict["fwd"]
        return {
            "op": "attention",
            "mode": mode,
            "dtype": p.dtype,
            "shape": p.shape,
            "head_dim": self.head_dim,
            "variant": name,
            "backend": name.removeprefix("ditfast-") if is_ours(name) else None,
            "interpreted": False,
            "error": verdict if failed else None,
            "parity": parity,
            "ms": None,
        }

    def _pass(self, mode, function):
        if mode == "fwd":
            return torch.no_grad()(partial(function, self.leaf, self.heads))
        if mode == "both":
            return lambda: torch.autograd.grad(function(self.leaf, self.heads), self.leaf, self.grad)
        return partial(torch.autograd.grad, function(self.leaf, self.heads), self.leaf, self.grad, retain_graph=True)

    def _speed(self, mode, ms, best):
        p, modes = self.problem, ("fwd", "bwd") if mode == "both" else (mode,)
        flops = executed_flops(mode, p.batch, p.tokens, self.heads, self.head_dim)
        size = sum(p.bytes_moved(m) for m in modes)
        by_bytes, by_math = size / self.ceiling["copy_gb_per_s"] / 1e6, flops / self.ceiling[p.dtype] / 1e9
        return {
            "ms": ms,
            "tflops": flops / ms["median"] / 1e9,
            "floor_ms": max(by_bytes, by_math),
            "floor_by": "bytes" if by_bytes > by_math else "math",
            "floor_share": max(by_bytes, by_math) / ms["median"],
            "vs_best_peer": best / ms["median"] if best else None,
        }


def problems(options) -> dict[str, Problem]:
    found, heads = {}, HEADS if options.device == "cuda" else 2
    for dtype, tokens, head_dim in product(options.dtypes, options.tokens, options.head_dims):
        size = max(1, options.total // tokens), tokens, heads * head_dim
        found[f"N={tokens} d={head_dim} {dtype}"] = Problem("attention", *size, dtype, options.device)
    return found


def run(options) -> dict:
    ceiling = {dtype: gemm_tflops((options.gemm,) * 3, dtype, options.device) for dtype in options.dtypes}
    ceiling["copy_gb_per_s"] = copy_gb_per_s(2**30 if options.device == "cuda" else 2**22, options.device)
    result = {"schema": 1, "benchmark": "attention", "header": header(options.device), "repeats": options.repeats}
    result |= {"ceiling": ceiling, "notes": []}
    if not any(map(is_ours, implementations(options.device))):
        result["notes"].append("no ditfast attention kernel can run here")
    resuming.measure_each(problems(options), lambda p: Bench(p, options, ceiling).cases(), result, options)
    result["header"] = header(options.device)
    return result


def main(argv=None) -> int:
    options = parse(argv)
    if options.device == "cpu":
        torch.set_num_threads(1)  # extra threads slow down tiny tensors
    result = run(options)
    jsonfile.write(options.json, result)
    report.show(result)
    if options.plot:
        report.plot(result, options.plot)
    return 0 if passes(result["cases"]) and not result["ended"] else 1
