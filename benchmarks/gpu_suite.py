"""Verify and time everything on this machine's GPU, and write one JSON file.

    python benchmarks/gpu_suite.py [--deadline 480] [--commit SHA] [--out DIR]
    python benchmarks/gpu_suite.py --interpret      # a rehearsal without a GPU, at tiny sizes
    python benchmarks/gpu_suite.py --docs           # docs/*.md from all results, without running anything

Stages run in order of worth, each in a process of its own with a share of the time. What a stage found is written as
it ends; one that fails is recorded red, one that hangs is killed, and the rest goes on. Exit status: 0; 1 if a stage
is not green; 2 if the arguments do not fit.
"""

import sys

from harness.start import start

if __name__ == "__main__":
    sys.exit(start("suite"))
