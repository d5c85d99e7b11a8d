"""Time attention on packed qkv by this package and by its peers: forward, backward, both.

    python benchmarks/bench_attention.py                                   # the sizes of DiT and larger, on a GPU
    python benchmarks/bench_attention.py --tokens 256 --head-dims 72 --json out.json --plot out.png
    python benchmarks/bench_attention.py --quick                           # tiny, on any machine

Every function takes packed qkv and gives its gradient, so that packing is in a peer's time. TFLOP/s count the true
head dim: 2 products forward, 5 backward. The floor is the larger of the fewest bytes at the speed of a copy and of
the arithmetic at the speed of a large GEMM, both measured in the same run. Where ditfast misses its error budget, no
time is printed; peers are timed and marked. Exit status: 0; 1 if ditfast is wrong or cannot run;
2 if the arguments do not fit.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("attention"))
