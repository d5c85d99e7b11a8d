"""Time a whole DiT, its forward, training steps and guided sampling steps, in PyTorch and in ditfast, side by side.

    python benchmarks/bench_model.py                                   # DiT-S/2, on any machine, in some minutes
    python benchmarks/bench_model.py --model DiT-XL/2 --batch 1 --dtype bf16 --mode guided --json out.json
    python benchmarks/bench_model.py --mode train --dtype autocast --compare out.json --fail-below 0.95

Output, samples and gradients have an error budget. Where ditfast misses it, no time is printed; other variants are
timed and marked. Exit status: 0; 1 if ditfast is wrong, was not measured, or is slower than --fail-below allows; 2 if
the arguments, or the machines compared, do not fit.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("model"))
