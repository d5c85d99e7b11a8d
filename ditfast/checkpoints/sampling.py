"""How to sample from a model: the object ``sampling`` in config.json, loaded as `DiT.sampling`.

    objective        "diffusion", "flow" or "meanflow": the training objective
    noise_schedule   of diffusion: a name of `ditfast.diffusion.schedule.SCHEDULES`
    path_type        of a flow: see `ditfast.flow.create_transport`
    prediction       of a flow: likewise
    guidance         of meanflow: the scale of the guidance in its training target, which its samples then have;
                     omitted for none
    vae              of the latents: sha256 of its weights (None if unknown), scale and shift, one number each or one
                     per channel: the model sees (z - shift) * scale. None for a model of pixels
    classes          the names of the labels, in order

vae and classes are omitted if unknown, and so is the object itself: it is {} then.
"""

import math
from numbers import Real
from typing import Any

from ditfast.counted import counted
from ditfast.diffusion.schedule import SCHEDULES
from ditfast.flow.paths import PATHS
from ditfast.flow.transport import PREDICTIONS
from ditfast.suggest import did_you_mean

OBJECTIVES = {  # further fields of each, and their defaults
    "diffusion": {"noise_schedule": "linear"},
    "flow": {"path_type": "Linear", "prediction": "velocity"},
    "meanflow": {},
}
CHOICES = {"noise_schedule": SCHEDULES, "path_type": tuple(PATHS), "prediction": PREDICTIONS}
FIELDS = ("objective", *CHOICES, "guidance", "vae", "classes")
VAE = ("sha256", "scale", "shift")


def check_sampling(sampling: Any, config: dict) -> dict[str, Any]:
    """Check a ``sampling`` object, {} if unknown, against the model's config, and return it.

    Raises:
        ValueError: naming the field, the rule and the value.
    """
    if not isinstance(sampling, dict):
        raise ValueError(f"sampling must be an object, got {type(sampling).__name__}")
    for name in sampling:
        if name not in FIELDS:
            raise ValueError(f"unknown field {name!r} of sampling{did_you_mean(name, FIELDS)}")
    if sampling:
        _check_objective(sampling, config)
    _check_vae(sampling.get("vae"), config["in_channels"])
    classes, count = sampling.get("classes"), config["num_classes"]
    names = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if classes is not None and not (names and len(classes) == count):
        raise ValueError(
            f"sampling's classes must be the names of {counted(count, 'class', 'classes')}, got {_short(classes)}"
        )
    return sampling


def settle_objective(recorded: dict, objective: str | None, default: dict) -> dict[str, Any]:
    """Complete a checkpoint's ``sampling`` for the requested objective.

    Args:
        recorded: the ``sampling``, {} if it has none.
        objective: the requested objective; None for the recorded one.
        default: the result if neither gives the objective.

    Raises:
        ValueError: an unknown objective, or one other than the recorded one.
    """
    if objective is not None and objective not in OBJECTIVES:
        hint = did_you_mean(objective, OBJECTIVES)
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}{hint}")
    known = recorded.get("objective")
    if known and objective not in (None, known):
        raise ValueError(f"objective must be {known!r}, the model's training objective, got {objective!r}")
    told = known or objective
    return {**({"objective": told, **OBJECTIVES.get(told, {})} if told else default), **recorded}


def recorded_by_sit(args: dict) -> dict[str, Any]:
    """The ``sampling`` implied by the arguments of SiT's training script; {} for other scripts."""
    if "path_type" not in args or "prediction" not in args:
        return {}
    return {"objective": "flow", "path_type": args["path_type"], "prediction": args["prediction"]}


def _check_objective(sampling, config):
    """Check the objective and its fields; an unknown objective has none."""
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
            raise ValueError(
                f"sampling's {name} does not belong to the objective {objective!r}, got {sampling[name]!r}"
            )
    scale = sampling.get("guidance")
    if scale is not None and (objective != "meanflow" or not isinstance(scale, Real) or not 0 <= scale < math.inf):
        raise ValueError(
            f"sampling's guidance must be a number of at least 0, of a meanflow model, got {_short(scale)}"
        )


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
