"""Time forms of kernels that are equally plausible without a GPU, in turns: docs/performance-notes.md, "to time".

In benchmarks/: python -m harness.alternatives [--deadline SECONDS] [--quick] [--json FILE]
"""

import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from ditfast.kernels import attention, rows
from harness import jsonfile, timing
from harness.arguments import Parser, count
from harness.errors import error_line
from harness.machine import header
from harness.problems import Problem

REPEATS = {"cuda": 30, "cpu": 1}
JUNCTION = "gated_residual_layer_norm_modulate"
FORMS = {  # of rows with D = 1152: (MAIN, TAIL, warps)
    "forward": ((1024, 128, 1), (1024, 256, 2), (2048, 0, 4)),
    "backward": ((1024, 256, 2), (1024, 128, 1), (1024, 256, 4), (2048, 0, 8)),
}
# kernels of attention, and tiles that are not in its own table: a second stage for dK/dV, for which ptxas serializes
# wgmma
TILES = {"forward": (), "dkdv": ((64, 64, 4, 2),), "dq": ()}


@contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def row_forms(direction: str):
    """{form: context in which the row kernels take it}."""
    own = rows.FORMS[1152]
    for form in FORMS[direction]:
        both = (form, own[1]) if direction == "forward" else (own[0], form)
        name = f"{form[0]} + {form[1]}, {form[2]} warps"
        yield name, partial(replaced, rows, "FORMS", rows.FORMS | {1152: both})


def chunk_sizes(direction: str):
    """{tokens per program: context in which the row kernels take so many}."""
    for tokens in (4, 1, 2, 8) if direction == "forward" else (32, 8, 16):
        yield f"{tokens} tokens per program", partial(replaced, rows, "_chunk_size", lambda *_, n=tokens, **__: n)


def attention_tiles(kernel: str, table):
    """{tiles: context in which one of attention's kernels takes them}."""
    own = attention.tiles
    for m, n, warps, stages in (*table[kernel], *TILES[kernel]):
        chosen = {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}

        def tiles(qkv, name, choice=0, chosen=chosen):
            return own(qkv, name, choice) | (chosen if name == kernel else {})

        yield f"{m} x {n}, {warps} warps, {stages} stages", partial(replaced, attention, "tiles", tiles)


def questions(device: str, is_quick: bool):
    """Yield (what is timed, problem, direction, {alternative: context}), the kernel's own form first."""
    size = (1, 4, 1152) if is_quick else (64, 256, 1152)
    dtype = "fp32" if is_quick else "bf16"  # the interpreter truncates to bf16
    for op in (JUNCTION, "layer_norm_modulate"):
        for direction in FORMS:
            for what, choices in (("row", row_forms), ("chunk", chunk_sizes)):
                yield f"{op} {direction}: {what}", Problem(op, *size, dtype, device), direction, choices(direction)
    table = attention.FLOAT32_TILES if is_quick else attention.TILES.get(attention.capability(torch.device(device)))
    for batch, tokens in ((1, 8),) if is_quick else ((64, 256), (16, 1024)):
        problem = Problem("attention", batch, tokens, 72 if is_quick else 1152, dtype, device)
        for kernel in TILES if table else ():
            direction = "forward" if kernel == "forward" else "backward"
            yield f"attention {kernel}", problem, direction, attention_tiles(kernel, table)


def compare(problem, direction, choices, device: str) -> list[dict]:
    """Cases of each alternative; one that is an error does not end the others."""
    made, errors = {}, {}
    leaves = problem.inputs()
    grads = problem.grads(problem.call(*leaves, backend="triton"))
    for name, context in choices:
        made[name] = partial(_run, problem, direction, context, leaves, grads)
    times = timing.measure(made, REPEATS[device], device, warmup=2, errors=errors)
    return [{"alternative": name, "ms": times.get(name), "error": errors.get(name)} for name in made]


def _run(problem, direction, context, leaves, grads):
    """Forward alone, or both: their difference is not needed, as alternatives differ in one of them."""
    with context():
        if direction == "forward":
            with torch.no_grad():
                return problem.call(*leaves, backend="triton")
        outputs = problem.call(*leaves, backend="triton")
        return torch.autograd.grad(outputs, [t for t in leaves if t.requires_grad], grads)


def run(options) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    end = time.monotonic() + (options.deadline or float("inf"))
    result = {"schema": 1, "benchmark": "alternatives", "header": header(device), "questions": [], "notes": []}
    for what, problem, direction, choices in questions(device, options.quick):
        if time.monotonic() > end:
            result["notes"].append(f"deadline: {what}, {problem.shape}, skipped")
            continue
        found = {"what": what, "shape": problem.shape, "dtype": problem.dtype, "direction": direction}
        try:
            found["cases"] = compare(problem, direction, choices, device)
        except Exception as error:  # a failing question must not lose the others
            found |= {"cases": [], "error": error_line(error)}
        result["questions"].append(found)
        jsonfile.write(options.json, result)
    return result


def main(argv=None) -> int:
    parser = Parser(prog="alternatives.py", description="Time alternative forms of kernels in turns.")
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny sizes")
    parser.add_argument("--deadline", type=count, metavar="SECONDS", help="start no question after this")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    result = run(options := parser.parse_args(argv))
    jsonfile.write(options.json, result)
    for question in result["questions"]:
        print(question["what"], "x".join(map(str, question["shape"])), question.get("error") or "")
        for case in question["cases"]:
            print(f"  {case['alternative']:40} {case['error'] or format(1e3 * case['ms']['median'], '.1f') + ' us'}")
    return 1 if any(question.get("error") for question in result["questions"]) else 0


if __name__ == "__main__":
    sys.exit(main())
