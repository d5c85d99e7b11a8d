"""Measure the operations, each relative to a copy of the same bytes or to the GEMM rate: see bench_ops.py."""

from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch._functorch.config as functorch

from ditfast import ops
from ditfast.ops.op import PRECISIONS
from harness import jsonfile, resuming, timing
from harness.arguments import Parser, count, one_of, require_writable
from harness.errors import error_line
from harness.machine import header
from harness.ops import report
from harness.problems import PROBLEMS, Problem, judge
from harness.verdicts import may_be_timed, passes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRODUCTS = tuple(op.name for op in (ops.MLP, ops.ATTENTION, ops.QKV_ATTENTION))  # bound by the GEMMs' rate
# on a GPU attention has its own benchmark, and of the MLP only the middle passes matter
OPS = tuple(name for name, op in PROBLEMS.items() if (op.moved and name not in PRODUCTS) or DEVICE == "cpu")
DEFAULTS = {  # (device, quick): batches, tokens, hidden sizes, dtypes, variants, repeats; most important first
    ("cuda", False): ([64, 32, 256], 256, [1152, 1024], list(PRECISIONS), ["eager", "compile", "ditfast"], 30),
    ("cuda", True): ([4], 64, [384], list(PRECISIONS), ["eager", "ditfast"], 3),
    ("cpu", False): ([4], 256, [1152], ["bf16"], ["eager", "compile", "ditfast"], 11),
    ("cpu", True): ([2], 16, [72], ["fp32", "fp16"], ["eager", "ditfast"], 3),
}


def parse(argv):
    parser = Parser(prog="bench_ops.py", description="Time operations in eager, torch.compile and ditfast.")
    add = parser.add_argument
    add("--ops", nargs="+", type=one_of(OPS), metavar="NAME", default=OPS, help=f"any of {', '.join(OPS)}")
    add("--modes", nargs="+", choices=("fwd", "bwd"), default=("fwd", "bwd"), help="forward alone, backward alone")
    add("--batch", nargs="+", type=count, metavar="N", help="samples (default 64 32 256)")
    add("--tokens", type=count, metavar="N", help="tokens per sample, a square number (default 256)")
    add("--dim", nargs="+", type=count, metavar="D", help="hidden sizes (default 1152 1024)")
    add("--dtypes", nargs="+", choices=PRECISIONS, help="autocast: an fp32 stream with bf16 branches")
    add("--variants", nargs="+", choices=("eager", "compile", "ditfast"), help="what to time")
    add("--repeats", type=count, metavar="N", help="timed runs per case (default 30)")
    add("--quick", action="store_true", help="smoke test: tiny shapes, few repeats")
    add("--deadline", type=count, metavar="SECONDS", help="start no case after this; report how many were skipped")
    add("--json", type=Path, metavar="FILE", help="write all results, case by case")
    resuming.add_option(parser)
    add("--plot", type=Path, metavar="FILE", help="plot GB/s of each operation and of a copy")
    options = parser.parse_args(argv)
    options.backend = "triton" if DEVICE == "cuda" or options.quick else "host"
    if options.backend == "triton" and options.ops is OPS:
        options.ops = [name for name in OPS if name not in PRODUCTS]
    names = ("batch", "tokens", "dim", "dtypes", "variants", "repeats")
    for name, default in zip(names, DEFAULTS[DEVICE, options.quick], strict=True):
        setattr(options, name, getattr(options, name) or default)
    try:
        require_writable(options)
    except ValueError as error:
        parser.error(error)
    return options


def problems(options) -> list[Problem]:
    found = []
    for dtype, batch, dim, op in product(options.dtypes, options.batch, options.dim, options.ops):
        if dtype in PROBLEMS[op].backends.get(options.backend, ()):
            found.append(Problem(op, batch, options.tokens, dim, dtype, DEVICE))
    return found


def is_timed(variant: str, backend: str) -> bool:
    """Times in the interpreter say nothing about a kernel."""
    return variant != "ditfast" or DEVICE == "cuda" or backend == "host"


class Bench:
    """One problem: check its variants against the contract, then time them interleaved with a copy or GEMM."""

    def __init__(self, problem, options):
        torch.compiler.reset()
        self.problem, self.options, self.is_product = problem, options, problem.name in PRODUCTS
        plain = partial(problem.call, backend=problem.op.fallback)
        made = {
            "eager": lambda: plain,
            "compile": lambda: torch.compile(plain, fullgraph=True, dynamic=False),
            "ditfast": lambda: partial(problem.call, backend=options.backend),
        }
        self.functions = {name: made[name]() for name in options.variants}

    def cases(self) -> list[dict]:
        verdicts = self._verdicts()
        found = []
        for mode in self.options.modes:
            if mode not in self.problem.op.moved and not self.is_product:
                continue
            cases = {name: self._case(name, mode, verdicts[name]) for name in self.functions}
            backend = self.options.backend
            timed = [name for name, case in cases.items() if may_be_timed(case) and is_timed(name, backend)]
            try:
                self._time(mode, {name: cases[name] for name in timed})
            except Exception as error:  # a failing problem must not lose the others
                for name in timed:
                    cases[name]["error"] = error_line(error)
            found += cases.values()
        return found

    def _verdicts(self):
        low = self.problem.results("reference")
        ref = self.problem.reference(low)
        return {name: self._verdict(function, low, ref) for name, function in self.functions.items()}

    def _verdict(self, function, low, ref):
        try:
            return judge(self.problem, self.problem.results(None, function), low, ref)
        except Exception as error:
            return error_line(error)

    def _case(self, variant, mode, verdict):
        p, failed = self.problem, isinstance(verdict, str)
        return {
            "op": p.name,
            "mode": mode,
            "dtype": p.dtype,
            "shape": p.shape,
            "variant": variant,
            "backend": self.options.backend if variant == "ditfast" else None,
            "interpreted": not is_timed(variant, self.options.backend),
            "bytes": None if self.is_product else p.bytes_moved(mode),
            "error": verdict if failed else None,
            "parity": None if failed else verdict[mode],
            "ms": None,
        }

    def _time(self, mode, cases):
        if not cases:
            return
        leaves = self.problem.inputs()
        passes = {name: self._pass(mode, self.functions[name], leaves) for name in cases}
        passes[""], rates = self._bound(mode)
        prepare = self._prepare(leaves)
        times = timing.measure(passes, self.options.repeats, DEVICE, warmup=3, prepare=prepare)
        for name, case in cases.items():
            speedup = {b: times[b]["median"] / times[name]["median"] for b in ("eager", "compile") if b in cases}
            case |= {"ms": times[name], "speedup": speedup} | rates(times[name]["median"], times[""]["median"])

    def _bound(self, mode):
        """What a pass is compared with, and (ms of the pass, ms of that) -> their rates and the pass's share."""
        p = self.problem
        if self.is_product:
            flops, (gemm, gemm_flops) = p.flops(mode), p.gemm()
            return gemm, lambda ms, bound: {
                "tflops": flops / ms / 1e9,
                "gemm_tflops": gemm_flops / bound / 1e9,
                "gemm_share": flops / ms / (gemm_flops / bound),
            }
        size = p.bytes_moved(mode)
        source = torch.randint(127, (size // 2,), dtype=torch.int8, device=DEVICE)
        return partial(torch.empty_like(source).copy_, source), lambda ms, bound: {
            "gb_per_s": size / ms / 1e6,
            "copy_gb_per_s": size / bound / 1e6,
            "copy_share": bound / ms,
        }

    def _pass(self, mode, function, leaves):
        if mode == "fwd" or not self.problem.is_whole_op:
            return torch.no_grad()(partial(function, *leaves))
        outputs = function(*leaves)
        wanted = [t for t in leaves if t.requires_grad]
        return partial(torch.autograd.grad, outputs, wanted, self.problem.grads(outputs), retain_graph=True)

    def _prepare(self, leaves):
        """Refill the MLP pass's first input, which the pass overwrites: repeated, it would end at zeros."""
        if self.problem.is_whole_op:
            return None
        return partial(leaves[0].copy_, leaves[0].clone())


def run(options) -> dict:
    functorch.donated_buffer = False  # a backward timed repeatedly must keep its graph
    result = {"schema": 1, "benchmark": "ops", "header": header(DEVICE), "repeats": options.repeats, "notes": []}
    if options.backend == "triton" and DEVICE == "cpu":
        result["notes"].append("no GPU: kernels were verified in Triton's interpreter, not timed")
    todo = {f"{problem.name} {problem.shape} {problem.dtype}": problem for problem in problems(options)}
    resuming.measure_each(todo, lambda problem: Bench(problem, options).cases(), result, options)
    result["header"] = header(DEVICE)
    return result


def main(argv=None) -> int:
    options = parse(argv)
    if DEVICE == "cpu" and options.quick:
        torch.set_num_threads(1)  # extra threads slow down tiny tensors
    result = run(options)
    jsonfile.write(options.json, result)
    report.show(result)
    if options.plot:
        report.plot(result, options.plot)
    return 0 if passes(result["cases"], options.variants) and not result["ended"] else 1
