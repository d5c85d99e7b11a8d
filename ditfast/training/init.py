"""Initial weights of a run: another model's, or new ones."""

from typing import Any

import torch

from ditfast.checkpoints.infer import MissingArgumentError
from ditfast.checkpoints.load import read_model, read_source
from ditfast.command import in_options, option_of
from ditfast.models import DiT
from ditfast.training import TrainError
from ditfast.training.config import ARCHITECTURE, NEW, Config, Init


def read_init(config: Config) -> Init:
    """Read the description of the model ``config.init``, without its weights; `NEW` if it is None.

    Raises:
        TrainError: it cannot be read.
    """
    if config.init is None:
        return NEW
    known = {name: getattr(config, name) for name in ARCHITECTURE if getattr(config, name) is not None}
    try:
        # the data determines the size; this one only stands in where weights cannot tell it
        arguments, sampling = read_source(config.init, input_size=1, **known)
    except (ValueError, OSError, ImportError) as error:
        here = f", here {option_of(error.argument)}" if isinstance(error, MissingArgumentError) else ""
        raise TrainError(f"--init {config.init}: {in_options(error, *ARCHITECTURE)}{here}") from error
    return Init(arguments, sampling)


def check_init(config: Config, init: Init) -> None:
    """Reject a config whose model differs from the one it starts from.

    Raises:
        TrainError: naming the first difference.
    """
    for name in (*ARCHITECTURE, "conditioning", "learn_sigma"):
        its, asked = init.arguments.get(name), getattr(config, name)
        if its is not None and its != asked:
            raise TrainError(
                f"--init {config.init} has {name} {its}, so {option_of(name)} must be {its}, got {asked}"
            )
    if init.arguments and init.arguments["second_time"] != (config.objective == "meanflow"):
        has = "a" if init.arguments["second_time"] else "no"
        raise TrainError(f"--init {config.init} has {has} second time, got --objective {config.objective}")


def make_model(config: Config, arguments: dict[str, Any], vae: dict[str, Any] | None, init: Init) -> tuple[DiT, str]:
    """The model with the run's initial weights, in float32, and a line saying where they come from."""
    if config.init is None:
        return DiT(**arguments), ""
    try:
        model, said = read_model(config.init, **arguments)
    except (ValueError, OSError, ImportError) as error:
        raise TrainError(f"--init {config.init}: {error}") from error
    said = said and said.replace("class_dropout_prob=0", f"{option_of('label_drop')} 0")
    line = f"starting from {config.init}; {said or 'all of its weights are kept'}"
    known = (init.sampling.get("vae") or {}).get("sha256")
    if known and vae and vae["sha256"] not in (None, known):
        line += "; it was trained on latents from another autoencoder"
    return model.to(torch.float32), line
