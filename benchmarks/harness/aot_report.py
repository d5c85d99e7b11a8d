"""Predict the speed of the row kernels on Hopper from machine code, for every D with a specialized form and dtype.

    cd benchmarks && python -m harness.aot_report --name NAME [--before results/aot/OTHER.json]

writes results/aot/NAME.json and results/aot/rows.md, which can show an earlier run for comparison. No GPU is needed.

At B = 64, N = 256, a row of D columns takes a multiprocessor at least the largest of three numbers of clocks:

    memory    bytes of the row, and of the sums over tokens that a program writes, at the speed of a copy
    issue     instructions of the row, plus its share of those outside the loop (`harness.aot.sass`)
    latency   bytes loaded, divided by the bytes all programs of a multiprocessor keep in flight per LATENCY

The share of a copy is the clocks of the row's bytes alone divided by that maximum: an upper bound from the compiler's
output, not a measurement.
"""

import argparse
import json
import os
from pathlib import Path

from harness.aot.cases import row_bytes
from harness.aot.compiler import build_all
from harness.aot.gpus import GPUS

RESULTS = Path(__file__).parents[1] / "results" / "aot"
B, N = 64, 256
LATENCY = 1e-6  # seconds from a load to its data under load: an assumption
OPS = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")
SUMS = dict(zip(OPS, (2, 2, 4), strict=True))  # rows that a backward program leaves: with the gradient of a bias
DTYPES = {
    "bf16": ("bfloat16", "bfloat16"),  # branches, residual stream
    "fp16": ("float16", "float16"),
    "autocast": ("bfloat16", "float32"),
    "fp32": ("float32", "float32"),
}
DIRECTIONS = {"forward_kernel": "forward", "backward_kernel": "backward"}
KEPT = ("kernel", "registers", "stack", "shared", "num_warps", "form", "rows_ahead", "chunk", "slots", "outside")


def columns() -> list[int]:
    from ditfast.kernels.rows import FORMS

    return sorted(FORMS)


def measure(op: str, dtype: str, d: int) -> list[dict]:
    """Compile forward and backward, and describe the result."""
    branch, stream = DTYPES[dtype]
    case = {"op": op, "dtype": branch, "stream_dtype": stream, "shape": [B, N, d]}
    rows = [r for r in build_all(case, 90) if "slots" in r]
    return [{"op": op, "dtype": dtype, "d": d, **{k: r[k] for k in KEPT}} | _bytes(case, r) for r in rows]


def _bytes(case, report):
    """Bytes per row: loaded, stored, and a program's partial sums, spread over its tokens."""
    kernel, d = report["kernel"], case["shape"][2]
    moved = {name: size * d for name, size in row_bytes(case, kernel).items()}
    return moved | {"sums": 0.0 if kernel == "forward_kernel" else 4 * SUMS[case["op"]] * d / report["chunk"]}


def predict(r: dict, gpu: str) -> dict:
    """Clocks of a row under each of the three limits, and the resulting share of a copy."""
    g = GPUS[gpu]
    programs = B * -(-N // r["chunk"]) / g.multiprocessors
    blocks = g.resident(r["registers"], r["num_warps"], r["shared"])
    in_flight = min(blocks, programs) * r["rows_ahead"] * r["loaded"]
    clocks = {
        "memory": g.memory_clocks(r["loaded"] + r["stored"] + r["sums"]),
        "issue": r["slots"] + r["outside"] / r["chunk"],
        "latency": r["loaded"] * LATENCY * g.clock / in_flight,
    }
    limit = max(clocks, key=clocks.get)
    share = g.memory_clocks(r["loaded"] + r["stored"]) / clocks[limit]
    return {"blocks": blocks, "in_flight": in_flight, **clocks, "limit": limit, "share": share}


def table(after: list[dict], before: list[dict]) -> str:
    """Markdown: one row per kernel, dtype and D; numbers before an arrow are those of ``before``."""
    old = {_key(r): r for r in before}
    header = ["operation", "dtype", "D", "form", "registers", "programs/SM", "KB in flight", "issue clocks"]
    header += [f"{gpu}: {what}" for gpu in GPUS for what in ("memory clocks", "share of a copy")]
    lines = [header, ["---"] * len(header)]
    for r in sorted(after, key=_key):
        pair = [old[_key(r)], r] if _key(r) in old else [r]
        by_gpu = {gpu: [predict(x, gpu) for x in pair] for gpu in GPUS}
        any_gpu = by_gpu["H200"]
        line = [f"{r['op']}, {DIRECTIONS[r['kernel']]}", r["dtype"], str(r["d"])]
        line += [_arrow([f"{'+'.join(str(n) for n in x['form'] if n)} x{x['num_warps']}" for x in pair])]
        line += [_arrow([str(x["registers"]) for x in pair]), _arrow([str(p["blocks"]) for p in any_gpu])]
        line += [_arrow([f"{p['in_flight'] / 1024:.0f}" for p in any_gpu])]
        line += [_arrow([f"{p['issue']:.0f}" for p in any_gpu])]
        for found in by_gpu.values():
            shares = [f"{100 * p['share']:.0f} % ({p['limit']})" for p in found]
            line += [f"{found[-1]['memory']:.0f}", _arrow(shares)]
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _key(r):
    return OPS.index(r["op"]), list(DIRECTIONS).index(r["kernel"]), list(DTYPES).index(r["dtype"]), r["d"]


def _arrow(values):
    return values[0] if len(set(values)) == 1 else " → ".join(values)


def document(after: dict, before: dict | None) -> str:
    files = f"`{after['name']}.json` by triton {after['triton']}"
    if before:
        files += f"; before the arrow `{before['name']}.json` by triton {before['triton']}"
    copies = ", ".join(f"{g.copy / 1e12:.2f} TB/s on {name}" for name, g in GPUS.items())
    clock, latency = GPUS["H200"].clock / 1e9, LATENCY * 1e6
    return f"""# Row kernels: what their machine code predicts

Predictions from cubins for sm_90, not measurements: {files}.
`benchmarks/harness/aot_report.py` generates this page and explains its columns.

Assumed: B = {B}, N = {N}; copies at {copies} (4.3 was measured, 90 % of the peak;
the H100 is assumed to reach as much of its 3.35); {clock} GHz; {latency:.0f} us from a load to its data under load.
In brackets: the limit.

{table(after["kernels"], before["kernels"] if before else [])}
"""


def _one_kernel_a_line(result):
    return json.dumps(result).replace('{"op"', '\n {"op"') + "\n"


def main():
    os.environ["TRITON_INTERPRET"] = "0"
    import triton

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", required=True, help="of the JSON file in results/aot")
    parser.add_argument("--before", type=Path, metavar="FILE", help="JSON of an earlier run to compare with")
    options = parser.parse_args()
    kernels = [r for d in columns() for op in OPS for dtype in DTYPES for r in measure(op, dtype, d)]
    result = {"benchmark": "aot", "name": options.name, "triton": triton.__version__, "arch": 90, "kernels": kernels}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{options.name}.json").write_text(_one_kernel_a_line(result))
    before = json.loads(options.before.read_text()) if options.before else None
    (RESULTS / "rows.md").write_text(document(result, before))


if __name__ == "__main__":
    main()
