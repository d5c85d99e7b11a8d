"""Compare diffusion, flow matching and MeanFlow at drawing digits in few steps, after training of equal cost.

    OMP_NUM_THREADS=1 python examples/few_steps/run.py

trains three models into few-steps and compares their samples of 1, 2, 4 and 25 steps: results/few_steps.json and
few_steps.png beside this file, and a table in docs/flow.md. The MeanFlow model is the one that
`python -m ditfast.sample --demo --one-step` samples from; --only meanflow trains it alone. Models that exist are
not trained again.
"""

import argparse
from pathlib import Path

import comparison
import report
import training

FOLDER = Path(__file__).parent
RESULTS, DOCS = FOLDER / "results", FOLDER.parents[1] / "docs" / "flow.md"


def main() -> None:
    o = parse_options()
    models = o.models / f"forwards-{o.forwards}-seed-{o.seed}"
    for objective in [o.only] if o.only else training.COST:
        if not (models / objective).exists():
            model = training.train(objective, o.forwards, o.seed)
            model.half().save_pretrained(models / objective)  # 16 bits: half the size
    if not o.only:
        found, shown = comparison.compare(models, o.forwards, o.count)
        report.write(found, shown, o.results, DOCS if o.results == RESULTS else None)


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", type=Path, default="few-steps", metavar="DIR", help="folder of the models (few-steps)")
    add("--only", choices=training.COST, help="train this one, and compare nothing")
    add("--forwards", type=int, default=9000, metavar="N", help="cost of each training, in forward passes (9000)")
    add("--count", type=int, default=1350, metavar="N", help="samples per model and number of steps (1350)")
    add("--seed", type=int, default=0, metavar="S", help="seed of the training (0)")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="folder of the results (results, beside this)")
    o = parser.parse_args()
    least = {"--forwards": max(training.COST.values()), "--count": 40}
    for option, low in least.items():
        value = getattr(o, option.removeprefix("--"))
        if value < low:
            parser.error(f"{option} must be at least {low}, got {value}")
    return o


if __name__ == "__main__":
    main()
