"""The demo: models that ship with the package, and the defaults of `python -m ditfast.sample --demo`."""

from pathlib import Path

from ditfast.models.dit import DiT

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
    "grid_columns": 10,
    "grid_scale": 8,
}
ONE_STEP = {  # on top of these; the model is of examples/few_steps
    "ckpt": str(ASSETS / "one-step-digits"),
    "sampler": "one-step",
    "steps": 1,
    "cfg": 1.0,
    "out": "demo-one-step",
}


def load_demo(*, one_step: bool = False) -> DiT:
    """A DiT of handwritten digits, (B, 1, 8, 8) in [-1, 1] with labels 0 to 9, in float32; needs no download.

    Args:
        one_step: the MeanFlow model, which samples in one step, instead of the diffusion model.
    """
    return DiT.from_pretrained(str((ONE_STEP if one_step else DEMO)["ckpt"])).float()
