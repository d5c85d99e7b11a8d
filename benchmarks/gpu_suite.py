"""Verify and time everything on this machine's GPU, and write one JSON file.

    python benchmarks/gpu_suite.py [--deadline 480] [--commit SHA] [--out DIR]
    python benchmarks/gpu_suite.py --stages parity tests            # the others keep their earlier results
    python benchmarks/gpu_suite.py --merge FILE FILE --out DIR      # merge runs of one commit on one machine
    python benchmarks/gpu_suite.py --interpret                      # rehearse without a GPU, at tiny sizes
    python benchmarks/gpu_suite.py --docs                           # generate docs/*.md from all results, run nothing

The most important stages run first, each in its own process with a share of the time. The file is always complete and
contains each case a few seconds after it was measured. A stage that fails is recorded as red, one that hangs is
killed, and the others still run. Exit status: 0; 1 if a stage is not green; 2 if the arguments are invalid.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("suite"))
