"""Verify and time everything on this machine's GPU, and write one JSON file.

    python benchmarks/gpu_suite.py [--deadline 480] [--commit SHA] [--out DIR]
    python benchmarks/gpu_suite.py --stages parity tests            # the others keep what they found before
    python benchmarks/gpu_suite.py --merge FILE FILE --out DIR      # runs of one commit on one machine as one file
    python benchmarks/gpu_suite.py --interpret                      # a rehearsal without a GPU, at tiny sizes
    python benchmarks/gpu_suite.py --docs                           # docs/*.md from all results, without running

The most important stages run first, each in a process of its own with a share of the time. The file is complete at
any time, and holds each case a few seconds after it was measured. A stage that fails is recorded red, one that hangs
is killed, and the rest goes on. Exit status: 0; 1 if a stage is not green; 2 if the arguments do not fit.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("suite"))
