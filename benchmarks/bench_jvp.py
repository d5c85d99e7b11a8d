"""Time and peak memory of a training step with a tangent through the model, as MeanFlow and its successors take it.

    python benchmarks/bench_jvp.py --depth 1 --json out.json      # one block of DiT-S/2 at 1024 tokens, in a minute

u and its tangent by (x, t) come from torch.func.jvp, the tangent goes into the loss as a constant, and the gradients
of all parameters follow. "explicit" is plain PyTorch, whose attention has tangents where it makes all (B, H, N, N)
weights; "+compile" compiles the function that calls torch.func.jvp.

u, its tangent and the gradients have an error budget. Where ditfast misses it, no time is printed. Exit status: 0; 1
if ditfast is wrong or was not measured; 2 if the arguments do not fit.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("jvp"))
