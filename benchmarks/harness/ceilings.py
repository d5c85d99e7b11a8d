"""Peak rates of this machine: copies by size, and the library's GEMM on the shapes of a DiT block.

In benchmarks/: python -m harness.ceilings [--quick] [--json FILE]
"""

import sys
from functools import partial
from pathlib import Path

import torch

from ditfast.ops.op import PRECISIONS
from harness import jsonfile, timing
from harness.arguments import Parser
from harness.machine import header

COPIES = {False: [2**k for k in range(22, 33)], True: [2**20, 2**22]}  # bytes read and written together
LINEARS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # inner and outer size in D
SIZES = {False: (64 * 256, 1152), True: (64, 72)}  # B*N, D


def copy_gb_per_s(size: int, device: str, repeats: int = 20) -> float:
    """Rate of a copy that reads and writes ``size`` bytes in total."""
    source = torch.randint(127, (size // 2,), dtype=torch.int8, device=device)
    run = partial(torch.empty_like(source).copy_, source)
    return size / _median(run, repeats, device) / 1e6


def gemm_tflops(shape, dtype: str, device: str, layout: str = "nn", repeats: int = 20) -> float:
    """Rate of the library's product of random matrices; ``layout`` says which operand is transposed ("t")."""
    m, n, k = shape
    kind = PRECISIONS[dtype][1]
    a = torch.randn((m, k) if layout[0] == "n" else (k, m), device=device).to(kind)
    b = torch.randn((k, n) if layout[1] == "n" else (n, k), device=device).to(kind)
    a, b = a if layout[0] == "n" else a.t(), b if layout[1] == "n" else b.t()
    out = torch.empty(m, n, device=device, dtype=kind)
    return 2 * m * n * k / _median(partial(torch.mm, a, b, out=out), repeats, device) / 1e9


def _median(run, repeats, device):
    return timing.measure({"": run}, repeats, device, warmup=3)[""]["median"]


def block_gemms(rows: int, dim: int):
    """Yield (name, (M, N, K), layout) for the twelve large products of a block, forward and backward."""
    for name, (inner, outer) in LINEARS.items():
        i, o = inner * dim, outer * dim
        yield f"{name} forward", (rows, o, i), "nt"
        yield f"{name} input gradient", (rows, i, o), "nn"
        yield f"{name} weight gradient", (o, i, rows), "tn"


def run(is_quick: bool) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtypes, repeats = (("bf16", "fp16"), 20) if device == "cuda" else (("fp32",), 3)
    copies = [{"bytes": size, "gb_per_s": copy_gb_per_s(size, device, repeats)} for size in COPIES[is_quick]]
    gemms = [
        {"gemm": name, "shape": shape, "dtype": dtype, "tflops": gemm_tflops(shape, dtype, device, layout, repeats)}
        for dtype in dtypes
        for name, shape, layout in block_gemms(*SIZES[is_quick])
    ]
    square = (256 if is_quick else 8192,) * 3
    gemms += [
        {"gemm": "square", "shape": square, "dtype": d, "tflops": gemm_tflops(square, d, device, repeats=repeats)}
        for d in dtypes
    ]
    return {"schema": 1, "benchmark": "ceilings", "header": header(device), "copies": copies, "gemms": gemms}


def main(argv=None) -> int:
    parser = Parser(prog="ceilings.py", description="Copies by size, and the GEMMs of a DiT-XL/2 block at B=64.")
    parser.add_argument("--quick", action="store_true", help="smoke test: tiny sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # extra threads slow down tiny tensors
    result = run(options.quick)
    jsonfile.write(options.json, result)
    for copy in result["copies"]:
        print(f"copy {copy['bytes'] / 2**20:6.0f} MiB  {copy['gb_per_s']:8.1f} GB/s")
    for gemm in result["gemms"]:
        shape = " x ".join(map(str, gemm["shape"]))
        print(f"{gemm['gemm']:22} {shape:22} {gemm['dtype']}  {gemm['tflops']:8.3f} TFLOP/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
