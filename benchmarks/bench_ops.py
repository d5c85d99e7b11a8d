"""Time each operation in eager PyTorch, in torch.compile and in ditfast, against a copy of the same bytes.

    python benchmarks/bench_ops.py                                # all operations at DiT sizes
    python benchmarks/bench_ops.py --ops gated_residual --dtypes bf16 --json out.json --plot out.png
    python benchmarks/bench_ops.py --quick                        # tiny, on any machine

Without a GPU it is the C++ kernels that are timed, and MLP and attention besides, against the rate of the library's
GEMMs; with --quick Triton's kernels run in its interpreter: they are proven, not timed. Where ditfast misses its
error budget, no time is printed; other variants are timed and marked. Exit status: 0; 1 if ditfast is wrong or was
not measured; 2 if the arguments do not fit.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("ops", interpret=True))
