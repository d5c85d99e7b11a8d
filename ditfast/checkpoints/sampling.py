"""How a model is sampled from: the object ``sampling`` of config.json, read as `DiT.sampling`.

    objective        "diffusion", "flow" or "meanflow": what it was trained for
    noise_schedule   of diffusion: a name of `ditfast.diffusion.schedule.SCHEDULES`
    path_type        of a flow: as `ditfast.flow.create_transport` takes it
    prediction       of a flow: the same
    vae              of the latents: sha256 of its weights (None if not known), scale and shift, a number each or one
                     for every channel: the model sees (z - shift) * scale. None if the model is one of pixels
    classes          the names of the labels, in their order

The last two are left out where they are not known.
"""

import math
from numbers import Real

from ditfast.diffusion.schedule import SCHEDULES
from ditfast.flow.paths import PATHS
from ditfast.flow.transport import PREDICTIONS
from ditfast.suggest import did_you_mean

OBJECTIVES = {  # what each has besides, and what that is where nothing says it
    "diffusion": {"noise_schedule": "linear"},
    "flow": {"path_type": "Linear", "prediction": "velocity"},
    "meanflow": {},
}
CHOICES = {"noise_schedule": SCHEDULES, "path_type": tuple(PATHS), "prediction": PREDICTIONS}
FIELDS = ("objective", *CHOICES, "vae", "classes")
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
    _check_objective(sampling, config)
    _check_vae(sampling.get("vae"), config["in_channels"])
    classes, count = sampling.get("classes"), config["num_classes"]
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if classes is not None and not (names and len(classes) == count):
        raise ValueError(f"sampling's classes must be the names of {count} classes, got {_short(classes)}")
    return sampling


def settle_objective(recorded: dict, objective: str | None, default: dict) -> dict:
    """What a checkpoint's ``sampling`` says, {} if it has none, for a model that is wanted for ``objective``.

    Args:
        default: the ``sampling`` of a model where neither tells the objective.

    Raises:
        ValueError: an unknown objective, or another than the recorded one.
    """
    if objective is not None and objective not in OBJECTIVES:
        hint = did_you_mean(objective, OBJECTIVES)
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}{hint}")
    known = recorded.get("objective")
    if known and objective not in (None, known):
        raise ValueError(f"objective must be {known!r}, for which the model was trained, got {objective!r}")
    told = known or objective
    return {**({"objective": told, **OBJECTIVES.get(told, {})} if told else default), **recorded}


def recorded_by_sit(args: dict) -> dict:
    """The ``sampling`` that the arguments of SiT's training script tell; {} of others."""
    if "path_type" not in args or "prediction" not in args:
        return {}
    return {"objective": "flow", "path_type": args["path_type"], "prediction": args["prediction"]}


def _check_objective(sampling, config):
    """The objective, and what belongs to it; of one that is not known here nothing is."""
    objective = sampling.get("objective")
    if not isinstance(objective, str):
        raise ValueError(f"sampling's objective must be a string, got {objective!r}")
    if objective == "meanflow" and not config.get("second_time"):
        raise ValueError("second_time must be true for sampling's objective 'meanflow', got False")
    for name in CHOICES if objective in OBJECTIVES else ():
        if name in OBJECTIVES[objective]:
            if sampling.get(name) not in CHOICES[name]:
                got = sampling.get(name)
                raise ValueError(f"sampling's {name} must be one of {', '.join(CHOICES[name])}, got {got!r}")
        elif name in sampling:
            raise ValueError(f"sampling's {name} is nothing of the objective {objective!r}, got {sampling[name]!r}")


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
