"""How a model is sampled from: the object ``sampling`` of config.json, read as `DiT.sampling`.

    objective        "diffusion"
    noise_schedule   a name of `ditfast.diffusion.schedule.SCHEDULES`
    vae              of the latents: sha256 of its weights (None if not known), scale and shift, a number each or one
                     for every channel: the model sees (z - shift) * scale. None if the model is one of pixels
    classes          the names of the labels, in their order

The last two are left out where they are not known.
"""

import math
from numbers import Real

from ditfast.diffusion.schedule import SCHEDULES
from ditfast.suggest import did_you_mean

FIELDS = ("objective", "noise_schedule", "vae", "classes")
VAE = ("sha256", "scale", "shift")


def check_sampling(sampling, config: dict) -> dict:
    """The object, if it can be one of a model with such a config.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    if not isinstance(sampling, dict):
        raise ValueError(f"sampling must be an object, got {type(sampling).__name__}")
    for name in sampling:
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r} of sampling{did_you_mean(name, FIELDS)}")
    objective, schedule = sampling.get("objective"), sampling.get("noise_schedule")
    if not isinstance(objective, str):
        raise ValueError(f"sampling's objective must be a string, got {objective!r}")
    if objective == "diffusion" and schedule not in SCHEDULES:
        raise ValueError(f"sampling's noise_schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
    _check_vae(sampling.get("vae"), config["in_channels"])
    classes, count = sampling.get("classes"), config["num_classes"]
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if classes is not None and not (names and len(classes) == count):
        raise ValueError(f"sampling's classes must be the names of {count} classes, got {_short(classes)}")
    return sampling


def _check_vae(vae, channels):
    if vae is None:
        return
    if not isinstance(vae, dict) or vae.keys() != set(VAE) or not isinstance(vae["sha256"], str | None):
        raise ValueError(f"sampling's vae must have {', '.join(VAE)}, got {_short(vae)}")
    for name in VAE[1:]:
        values = vae[name] if isinstance(vae[name], list) else [vae[name]]
        finite = all(isinstance(value, Real) and math.isfinite(value) for value in values)
        if not finite or len(values) not in (1, channels):
            raise ValueError(f"sampling's vae must have a number as {name}, or {channels}, got {_short(vae[name])}")


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
