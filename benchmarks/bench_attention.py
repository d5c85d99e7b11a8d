"""Time attention on packed qkv in ditfast and other libraries: forward, backward and both.

    python benchmarks/bench_attention.py                                   # the sizes of DiT and larger, on a GPU
    python benchmarks/bench_attention.py --tokens 256 --head-dims 72 --json out.json --plot out.png
    python benchmarks/bench_attention.py --quick                           # tiny, on any machine

Every function takes packed qkv and returns its gradient, so a peer's time includes packing. TFLOP/s count the true
head dim: 2 products forward, 5 backward. The floor is the larger of two times measured in the same run: the minimum
bytes at the speed of a copy, and the arithmetic at the speed of a large GEMM. If ditfast exceeds its error budget, no
time is printed; peers that exceed it are timed and marked. Exit status: 0; 1 if ditfast is wrong or cannot run; 2 if
the arguments are invalid.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("attention"))
