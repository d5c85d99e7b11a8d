"""Throw good and bad input at the package, and report what it handles wrongly.

    python tests/fuzz.py --minutes 5 --seed 0
    python tests/fuzz.py --seed 0 --only images --case 37

Every case is known to be good, bad, or either. Faults are: a bad case that is accepted, a good one that is rejected,
an error that does not name what is wrong, a traceback, a crash, more than 10 s, more than 2 GiB. A case depends only
on the seed, its generator and its number. The exit status is 1 if there is a fault.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from itertools import count
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a process with several threads cannot be forked
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # nor can one that has used a GPU
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from fuzzing import calls, child, command_lines, configs, images, model_files  # noqa: E402
from fuzzing.kit import Kit  # noqa: E402

GENERATORS = {
    module.__name__.split(".")[1]: module for module in (command_lines, configs, model_files, images, calls)
}


def main() -> None:
    o = parse_options()
    torch.set_num_threads(1)
    seed = int.from_bytes(os.urandom(4)) if o.seed is None else o.seed
    print(f"seed {seed}")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        kit = Kit(Path(folder))
        if o.case is not None:
            what, end, fault = run(kit, seed, o.only, o.case, show=True)
            sys.exit(f"{what}\n{end}\n{fault}" if fault else print(what, end, sep="\n"))
        ends, faults = run_many(kit, seed, [o.only] if o.only else [*GENERATORS], o.minutes, o.cases)
    for name, found in ends.items():
        print(f"{name:14}{found.total():6} cases  " + ", ".join(f"{n} {end}" for end, n in sorted(found.items())))
    print(f"{faults} faults in {sum(found.total() for found in ends.values())} cases")
    sys.exit(1 if faults else 0)


def run_many(kit, seed, names, minutes, most):
    """Run cases of each generator in turn; return how they ended, by generator, and the number of faults."""
    end_at = time.monotonic() + 60 * minutes
    ends, faults = {name: Counter() for name in names}, 0
    for index in count():
        for name in names:
            if index == most or time.monotonic() > end_at:
                return ends, faults
            what, end, fault = run(kit, seed, name, index)
            ends[name][end] += 1
            if fault:
                faults += 1
                print(f"FAULT --seed {seed} --only {name} --case {index}: {what}\n    {fault}", flush=True)


def run(kit, seed, name, index, show=False):
    rng = random.Random(f"{seed} {name} {index}")
    return child.run_case(lambda: GENERATORS[name].make_case(rng, kit), kit.folder / f"case-{name}-{index}", show)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=5, help="how long to run, not counting a few seconds of start-up (5)")
    add("--cases", type=int, help="cases per generator, at most")
    add("--seed", type=int, help="seed of all cases (default: a new one)")
    add("--only", choices=GENERATORS, help="one generator")
    add("--case", type=int, help="run only this case, and show its output")
    o = parser.parse_args()
    if o.case is not None and o.only is None:
        parser.error("--case needs --only")
    return o


if __name__ == "__main__":
    main()
