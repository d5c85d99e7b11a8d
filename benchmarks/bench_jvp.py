"""Measure time and peak memory of a training step with a tangent through the model, as in MeanFlow.

    python benchmarks/bench_jvp.py --depth 1 --json out.json      # one block of DiT-S/2 at 1024 tokens, in a minute

torch.func.jvp computes u and its tangent with respect to (x, t); the tangent enters the loss as a constant, and the
gradients of all parameters are computed. "explicit" is plain PyTorch with attention that materializes all
(B, H, N, N) weights, the only form with tangents; "+compile" compiles the function that calls torch.func.jvp.

u, its tangent and the gradients have an error budget. If ditfast exceeds it, no time is printed. Exit status: 0; 1 if
ditfast is wrong or was not measured; 2 if the arguments are invalid.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("jvp"))
