"""Training objectives: the times drawn in a step, and the loss at those times."""

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ditfast.command import by_option, option_of
from ditfast.diffusion import create_diffusion
from ditfast.flow import MeanFlow, create_transport
from ditfast.training import TrainError

if TYPE_CHECKING:  # config imports this module
    from ditfast.training.config import Config

TIMES = ("time_sampling", "time_mean", "time_std")
FIELDS = {  # objective -> config fields that apply to it but not to every objective
    "diffusion": ("noise_schedule",),
    "flow": ("path_type", "prediction", "loss_weight", *TIMES, "time_shift"),
    "meanflow": (*TIMES, "interval_ratio", "adaptive_power", "target_cfg", "target_mix", "target_from"),
}
RECORDED = ("noise_schedule", "path_type", "prediction")  # in a model's ``sampling``
# defaults of fields that are None in a config
OPEN: dict[str, Any] = {"noise_schedule": "linear", "path_type": "Linear", "prediction": "velocity"}
OPEN |= {"time_sampling": "uniform", "time_mean": 0.0, "sample_steps": 50, "cfg": 4.0}
OPEN_MEAN = {**OPEN, "time_sampling": "logit-normal", "time_mean": 0.4, "sample_steps": 1, "cfg": 1.0}
# argument of MeanFlow -> config field
NAMES = {"guidance": "target_cfg", "guidance_mix": "target_mix", "guidance_interval": "target_from"}


class Objective(NamedTuple):
    """A training objective, for b samples."""

    draw_times: Callable[..., tuple[torch.Tensor, ...]]  # (count, device, generator) -> (b,) each
    losses: Callable[..., dict[str, torch.Tensor]]  # (model, x, y, times, noise) -> per-sample losses, (b,) each
    shown: str = "loss"  # the one to log
    forwards: int = 3  # cost of forward and backward, in forward passes of the model


def fill_objective(config: "Config", recorded: dict[str, Any]) -> dict[str, Any]:
    """Values for the config's None fields: those of ``recorded``, a model's ``sampling``, or the defaults.

    Raises:
        TrainError: the model was trained for an unknown objective.
    """
    objective = config.objective or recorded.get("objective", "diffusion")
    if objective not in FIELDS:
        raise TrainError(f"--init was trained for the objective {objective!r}: --objective {' or '.join(FIELDS)}")
    known = {name: recorded[name] for name in RECORDED if name in recorded}
    values = {**(OPEN_MEAN if objective == "meanflow" else OPEN), **known}
    names = [name for name in (*FIELDS[objective], "sample_steps", "cfg") if name in values]
    return {**{name: values[name] for name in names if getattr(config, name) is None}, "objective": objective}


def check_objective(config: "Config") -> None:
    """Reject options of other objectives and invalid values.

    Raises:
        TrainError: naming the option.
    """
    assert config.objective is not None  # filled in
    defaults = {field.name: field.default for field in fields(config)}
    for name in dict.fromkeys(name for names in FIELDS.values() for name in names):
        if name not in FIELDS[config.objective] and getattr(config, name) != defaults[name]:
            takers = " or ".join(objective for objective, names in FIELDS.items() if name in names)
            raise TrainError(f"{option_of(name)} is for --objective {takers}, got --objective {config.objective}")
    if config.loss_weight and config.prediction == "velocity":
        raise TrainError(f"--loss-weight {config.loss_weight} is for --prediction noise or score, got velocity")
    make_objective(config, 1)  # checks the values; the number of classes does not matter
    assert config.cfg is not None  # filled in
    if config.sample_every and config.cfg > 1 and (scale := learned_guidance(config)) != 1:
        raise TrainError(f"--cfg must be 1 for a model that learns to guide itself, by {scale:g}, got {config.cfg:g}")


def make_objective(config: "Config", num_classes: int) -> Objective:
    """The objective of a config.

    Raises:
        TrainError: naming the invalid option.
    """
    assert config.objective is not None  # filled in
    make = {"diffusion": _diffusion, "flow": _flow, "meanflow": _mean_flow}[config.objective]
    with by_option(ValueError, TrainError, *FIELDS[config.objective], **NAMES):
        return make(config, num_classes)


def _diffusion(config, num_classes):
    diffusion = create_diffusion("", noise_schedule=config.noise_schedule, learn_sigma=config.learn_sigma)

    def draw_times(count, device, generator):
        return (torch.randint(diffusion.num_timesteps, (count,), device=device, generator=generator),)

    def losses(model, x, y, times, noise):
        return diffusion.training_losses(model, x, *times, {"y": y}, noise)

    return Objective(draw_times, losses)


def _flow(config, num_classes):
    names = ("path_type", "prediction", "time_sampling", "time_mean", "time_std", "time_shift")
    transport = create_transport(**{name: getattr(config, name) for name in names}, loss_weight=config.loss_weight)

    def draw_times(count, device, generator):
        return (transport.draw_times(count, device, generator),)

    def losses(model, x, y, times, noise):
        return transport.training_losses(model, x, {"y": y}, t=times[0], noise=noise)

    return Objective(draw_times, losses)


def _mean_flow(config, num_classes):
    names = ("time_sampling", "time_mean", "time_std", "interval_ratio", "adaptive_power")
    guidance = {"guidance": config.target_cfg, "guidance_mix": config.target_mix, "null_label": num_classes}
    guidance["guidance_interval"] = config.target_from, 1.0
    how = {"target_apart": config.checkpointing == "full"}
    mean_flow = MeanFlow(**{name: getattr(config, name) for name in names}, **guidance, **how)

    def losses(model, x, y, times, noise):
        t, r = times
        return mean_flow.training_losses(model, x, {"y": y}, t=t, r=r, noise=noise)

    guided = (config.target_cfg != 1 or config.target_mix > 0) + (config.target_mix > 0)
    forwards = 4 + guided + how["target_apart"]  # the tangent costs one
    return Objective(mean_flow.draw_times, losses, "mse", forwards)  # its weighted loss is about 1 for every sample


def describe_objective(config: "Config") -> dict[str, Any]:
    """The objective as recorded in a model's ``sampling``."""
    assert config.objective is not None  # filled in
    kept = [name for name in RECORDED if name in FIELDS[config.objective]]
    scale = learned_guidance(config)
    guidance = {} if scale == 1 else {"guidance": scale}
    return {"objective": config.objective, **{name: getattr(config, name) for name in kept}, **guidance}


def learned_guidance(config: "Config") -> float:
    """The guidance scale of the trained model's own samples, 1 for none. Source: Geng et al. 2025, equation 21."""
    return round(config.target_cfg / (1 - config.target_mix), 6) if config.objective == "meanflow" else 1.0
