"""Find the sizes from which the C++ CPU kernels beat PyTorch, for the table in ditfast/ops/backends/on_cpu.py.

    python benchmarks/bench_host.py [--compile] [--ops NAME …] [--json FILE]

Each size is announced on standard error and gives two lines: forward only, and forward and backward. With --compile,
most of the time goes to compiling. To minimize the influence of other load, times are process times on one thread,
the minimum of many interleaved runs. The table has the smallest size from which the kernel is fastest at every
measured size.
"""

import argparse
import json
import random
import sys
import time
from collections import defaultdict

import torch

from ditfast import _C, keep_freed_memory, ops
from ditfast.ops.attention import heads_of
from ditfast.ops.op import PRECISIONS, RandomTensors
from ditfast.ops.patches import CHANNELS, PATCH
from harness.arguments import Parser, one_of
from harness.machine import header

SIZES = ((1, 16, 64), (2, 64, 128), (1, 256, 384), (4, 256, 384), (4, 256, 1152))  # B, N, D
WIDTHS = {  # D -> width of the counted elements (B, N, width), if not D
    "mlp": lambda dim: 4 * dim,
    "attention": lambda dim: dim // heads_of(dim),
    "patchify": lambda dim: CHANNELS * PATCH**2,
    "unpatchify": lambda dim: 2 * CHANNELS * PATCH**2,
}
MARGINS = {"mlp": 0.995}  # at most this share of the other's time counts as faster; an MLP is mostly the same GEMMs
MARGIN = 0.95
SECONDS = 0.25  # per variant of a case
MEASURED = {op.name: op for op in ops.ALL if "host" in op.backends}


def run_of(op, named, backend, training, context):
    def run():
        with context():
            out = op.function(**named, backend=backend)
        if training:
            outputs = [t for t in (out if isinstance(out, tuple) else (out,)) if t.requires_grad]
            leaves = [t for t in named.values() if torch.is_tensor(t)]
            torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs])

    return run


def compiled_run_of(op, named, backend, training, context):
    torch.compiler.reset()  # of one function, PyTorch compiles eight versions at most, then runs it uncompiled
    compiled = torch.compile(lambda **inputs: op.function(**inputs, backend=backend), dynamic=False)
    fake = argparse.Namespace(function=lambda backend, **inputs: compiled(**inputs))
    return run_of(fake, named, backend, training, context)


def milliseconds(runs: dict) -> dict:
    """{name: minimum process time in ms over many interleaved runs}."""
    least = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
        run()
    end, turns = time.perf_counter() + SECONDS * len(runs), 0
    order, chance = [*runs.items()], random.Random(0)
    while turns < 6 or time.perf_counter() < end:
        chance.shuffle(order)  # what runs after the reference, which fills the caches and the heap, pays for it
        for name, run in order:
            start = time.process_time_ns()
            run()
            least[name] = min(least[name], (time.process_time_ns() - start) / 1e6)
        turns += 1
    return least


def measure(op, precision, size, with_compile):
    """Yield a result for forward only and one with backward."""
    named = op.arguments(RandomTensors(PRECISIONS[precision], "cpu"), *size)
    named = {n: t.detach().requires_grad_() if torch.is_tensor(t) else t for n, t in named.items()}
    other = "sdpa" if "sdpa" in op.backends else "reference"
    elements = size[0] * size[1] * WIDTHS.get(op.name, lambda dim: dim)(size[2])

    def context():
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast")

    for mode, training in (("inference", False), ("training", True)):
        with torch.set_grad_enabled(training):
            runs = {"host": run_of(op, named, "host", training, context)}
            runs[other] = run_of(op, named, other, training, context)
            if with_compile:
                runs["compile"] = compiled_run_of(op, named, other, training, context)
            ms = milliseconds(runs)
        yield {"op": op.name, "precision": precision, "elements": elements, "mode": mode, "ms": ms}


def table_of(results):
    """{op: {precision: smallest size from which the kernel is fastest}}."""
    table = defaultdict(dict)
    for op, precision in dict.fromkeys((r["op"], r["precision"]) for r in results):
        margin = MARGINS.get(op, MARGIN)
        mine = [r for r in results if (r["op"], r["precision"]) == (op, precision)]
        lost = [
            r["elements"]
            for r in mine
            if r["ms"]["host"] > margin * min(v for k, v in r["ms"].items() if k != "host")
        ]
        won = sorted({r["elements"] for r in mine if not lost or r["elements"] > max(lost)})
        if won:
            table[op][precision] = won[0]
    return dict(table)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile, which is slow")
    parser.add_argument("--ops", nargs="+", default=[*MEASURED], type=one_of(MEASURED), metavar="NAME", help="(all)")
    parser.add_argument("--precisions", nargs="+", default=[*PRECISIONS], choices=PRECISIONS)
    parser.add_argument("--json", help="write all results to this file")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    todo = [
        (op, precision, size)
        for op in map(MEASURED.get, args.ops)
        for precision in op.backends["host"]
        if precision in args.precisions
        for size in SIZES
    ]
    results = []
    for i, (op, precision, size) in enumerate(todo, 1):
        print(f"{i}/{len(todo)}: {op.name}, {precision}, B, N, D = {size}", file=sys.stderr, flush=True)
        for result in measure(op, precision, size, args.compile):
            results.append(result)
            times = "  ".join(f"{name} {value:.3f}" for name, value in result["ms"].items())
            print(f"{op.name:36} {precision:9} {result['elements']:9} {result['mode']:10} {times}", flush=True)
    found = {"header": header("cpu"), "isa": _C.isa(), "table": table_of(results), "results": results}
    print(json.dumps({_C.isa(): found["table"]}, indent=4))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
