"""Which objective draws digits in few steps: diffusion, flow matching and MeanFlow, trained at the same cost.

    OMP_NUM_THREADS=1 python examples/few_steps/run.py

trains three models into few-steps, and compares their samples of 1, 2, 4 and 25 steps: results/few_steps.json and
few_steps.png beside this file, and a table in docs/flow.md. The third is what `python -m ditfast.sample --demo
--one-step` samples from (--train meanflow --train-only makes it alone). Models that are there are not trained again.
"""

import argparse
from pathlib import Path

import comparison
import report
import training

FOLDER = Path(__file__).parent
DOCS = FOLDER.parents[1] / "docs" / "flow.md"


def main() -> None:
    o = parse_options()
    for objective in o.train:
        folder = o.models / objective
        if not folder.exists():
            model = training.train(objective, o.forwards, o.seed)
            model.half().save_pretrained(folder)  # 16 bits: half the size
    if o.train_only:
        return
    found = comparison.compare(o.models, o.forwards, o.count)
    report.write(*found, o.results, DOCS if o.results == FOLDER / "results" else None)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=Path, default="few-steps", metavar="DIR", help="of a folder for each (few-steps)")
    add("--train", nargs="*", choices=training.COST, default=[*training.COST], help="which of them (all)")
    add("--train-only", action="store_true", help="compare nothing")
    add("--forwards", type=int, default=9000, metavar="N", help="what each training costs, of a batch (9000)")
    add("--count", type=int, default=1350, metavar="N", help="samples to compare (1350)")
    add("--seed", type=int, default=0, metavar="S", help="of weights, batches, times and noise (0)")
    add("--results", type=Path, default=FOLDER / "results", metavar="DIR", help="for JSON and picture (results)")
    o = parser.parse_args()
    least = {"--forwards": max(training.COST.values()), "--count": 40}
    for option, low in least.items():
        value = getattr(o, option.removeprefix("--"))
        if value < low:
            parser.error(f"{option} must be at least {low}, got {value}")
    return o


if __name__ == "__main__":
    main()
