"""Time a whole DiT in PyTorch and ditfast: forward, training steps and guided sampling steps.

    python benchmarks/bench_model.py                                   # DiT-S/2, on any machine, in a few minutes
    python benchmarks/bench_model.py --model DiT-XL/2 --batch 1 --dtype bf16 --mode guided --json out.json
    python benchmarks/bench_model.py --mode train --dtype autocast --compare out.json --fail-below 0.95

Output, samples and gradients have an error budget. If ditfast exceeds it, no time is printed; other variants are
timed and marked. Exit status: 0; 1 if ditfast is wrong, was not measured, or is slower than --fail-below allows; 2 if
the arguments are invalid or the machines cannot be compared.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("model"))
