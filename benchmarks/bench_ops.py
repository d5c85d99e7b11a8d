"""Time each operation in eager PyTorch, torch.compile and ditfast, relative to a copy of the same number of bytes.

    python benchmarks/bench_ops.py                                # all operations at DiT sizes
    python benchmarks/bench_ops.py --ops gated_residual --dtypes bf16 --json out.json --plot out.png
    python benchmarks/bench_ops.py --quick                        # tiny, on any machine

Without a GPU this times the C++ kernels, including MLP and attention, which are relative to the library's GEMM rate;
with --quick the Triton kernels run in Triton's interpreter, to be verified, not timed. If ditfast exceeds its error
budget, no time is printed; other variants are timed and marked. Exit status: 0; 1 if ditfast is wrong or was not
measured; 2 if the arguments are invalid.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("ops", interpret=True))
