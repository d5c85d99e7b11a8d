"""Defaults of `python -m ditfast.sample --demo`, instead of those of other runs."""

from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"
DEMO = {  # the model is examples/digits.py's
    "ckpt": str(ASSETS / "digits"),
    "decoder": "pixel",
    "classes": [*range(10)] * 6,
    "sampler": "ddim",
    "steps": 25,
    "cfg": 1.5,
    "dtype": "auto",
    "batch": 60,
    "out": "demo",
    "grid": "demo.png",
    "grid_columns": 10,
    "grid_scale": 8,
}
ONE_STEP = {  # on top of these; the model is of examples/few_steps
    "ckpt": str(ASSETS / "one-step-digits"),
    "sampler": "one-step",
    "steps": 1,
    "cfg": 1.0,
    "out": "demo-one-step",
    "grid": "demo-one-step.png",
}
