"""Time DiT blocks in eager PyTorch, torch.compile and ditfast on the same weights and inputs.

    python benchmarks/bench_block.py                            # a full-size DiT-XL/2 block, on any machine
    python benchmarks/bench_block.py --model DiT-L/2 --batch 32 --dtype autocast --json out.json --plot out.png
    python benchmarks/bench_block.py --compare out.json --fail-below 0.95

Output and gradients have an error budget. If ditfast exceeds it, no time is printed; other variants are timed and
marked. ditfast+compile is excused if compile exceeds it by as much, which requires measuring both. Exit status: 0; 1
if ditfast is wrong, was not measured, or is slower than --fail-below allows; 2 if the arguments are invalid or the
machines cannot be compared.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("block"))
