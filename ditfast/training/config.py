"""Configuration of a run: one dataclass, filled from flags and a YAML file."""

import math
import os
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple

from ditfast.command import by_option, option_of
from ditfast.data.sources import BUILT_IN
from ditfast.data.stream import MOST_WORKERS
from ditfast.models.limits import check_arguments
from ditfast.models.presets import SIZES, DiT_models
from ditfast.paths import why_unusable
from ditfast.suggest import did_you_mean
from ditfast.training import TrainError
from ditfast.training.objective import check_objective, fill_objective

SMALL = {"depth": 4, "hidden_size": 96, "num_heads": 3, "patch_size": 2}  # enough for digits and glyphs
ARCHITECTURE = tuple(SMALL)


@dataclass(frozen=True)
class Config:
    """Train a DiT. Defaults are the paper's (section 4, "Training")."""

    data: str = "digits"
    """digits, glyphs, a folder of images in one subfolder per class, or a folder written by ditfast.encode."""
    image_size: int | None = None
    """Side of images and glyphs in pixels; required for images."""
    vae: str | None = None
    """AutoencoderKL that encodes images in every step and decodes sample grids: ema, mse or a folder."""
    num_classes: int | None = None
    """If given, checked against the data."""
    flip: bool = True
    """Mirror images and latents at random."""
    workers: int | None = None
    """Data-loading processes per rank. Default: 0 for digits and glyphs, else 4 or the number of cores if lower."""
    unreadable: Literal["fail", "skip"] = "fail"
    """On an unreadable image: end the run, or count it and use the next one instead."""

    init: str | None = None
    """Model to start from, with its architecture: a folder, a file, a released name or a name on the Hub."""
    model: str | None = None
    """Preset, such as DiT-B/4. Default: DiT-XL/2 for images and latents, a small model for digits and glyphs."""
    depth: int | None = None
    """Overrides the preset, like the next three."""
    hidden_size: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    conditioning: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] | None = None
    """Default: that of --init, else adaln_zero."""
    label_drop: float = 0.1
    """Probability of replacing a label by the null label, for classifier-free guidance."""
    learn_sigma: bool = True
    """Also predict a variance; flows train only the other half of the channels, as SiT does."""

    objective: Literal["diffusion", "flow", "meanflow"] | None = None
    """Default: that of --init, else diffusion."""
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] | None = None
    """For diffusion. Default: that of --init, else linear."""
    path_type: Literal["Linear", "GVP", "VP"] | None = None
    """For flow. Default: that of --init, else Linear."""
    prediction: Literal["velocity", "noise", "score"] | None = None
    """For flow. Default: that of --init, else velocity."""
    loss_weight: Literal["velocity", "likelihood"] | None = None
    """For flow with --prediction noise or score."""
    time_sampling: Literal["uniform", "logit-normal"] | None = None
    """For flow and meanflow. Default: uniform, or logit-normal for meanflow."""
    time_mean: float | None = None
    """Mean of the normal. Default: 0, or 0.4 for meanflow. Time is 0 at noise and 1 at data."""
    time_std: float = 1.0
    time_shift: float = 1.0
    """For flow: shift training toward noise, as larger images require."""
    interval_ratio: float = 0.25
    """For meanflow: share of samples trained on an average velocity rather than an instantaneous one."""
    adaptive_power: float = 1.0
    """For meanflow: p in the weight (error² + c)^-p of a sample's squared error."""
    target_cfg: float = 1.0
    """For meanflow: guidance scale to learn, so sampling is guided at one model call per step."""
    target_mix: float = 0.0
    """For meanflow: share of that guidance based on the model's own predictions."""
    target_from: float = 0.0
    """For meanflow: earliest time at which to guide."""

    steps: int = 400_000
    batch: int = 256
    """Samples per step over all ranks."""
    accumulate: int = 1
    """Forward and backward passes per step, for batches that do not fit in memory."""
    lr: float = 1e-4
    warmup: int = 0
    """Steps of linear learning-rate warmup."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the gradient's mean and of its square's."""
    weight_decay: float = 0.0
    clip: float | None = None
    """Maximum gradient norm."""
    ema: float = 0.9999
    """Decay of the weights' moving average, which starts from the initial weights."""
    ema_warmup: Literal["auto", "on", "off"] = "auto"
    """Limit the decay to (1 + t) / (10 + t) at step t. auto: in runs of fewer than 5 / (1 - ema) steps."""
    seed: int = 0
    """All randomness depends only on it and the step number."""

    precision: Literal["fp32", "bf16", "pure_bf16"] | None = None
    """bf16 is autocast; pure_bf16 computes in bf16 with float32 masters. Default: bf16 on a GPU, else fp32."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: full weights on every rank (ddp), or sharded by FSDP2 (fsdp)."""
    checkpointing: Literal["none", "full"] = "none"
    """full recomputes every block in backward instead of storing its activations."""
    recompute_mlp: bool = False
    """Recompute only the MLP activations."""
    compile: bool = False
    """Use torch.compile."""
    backend: str | None = None
    """Backend of ditfast's operations, such as reference."""

    out: str = "runs/train"
    """Output folder."""
    resume: str | None = None
    """auto: resume the run in the output folder, if any; or a checkpoint, or another run's folder for its newest."""
    take_over: bool = False
    """Take the output folder over from a run that is dead; needed if it ran on another host."""
    save_every: int = 50_000
    """Steps between checkpoints."""
    keep: int = 3
    """Number of checkpoints to keep."""
    log_every: int = 100
    """Steps between lines of metrics.jsonl, TensorBoard and the log."""
    sample_every: int = 10_000
    """Steps between sample grids, drawn from the averaged weights; 0 for none."""
    sample_steps: int | None = None
    """Sampler steps for the grids. Default: 50, or 1 for meanflow."""
    cfg: float | None = None
    """Guidance scale for the grids. Default: 4, or 1 for meanflow, whose models learn it."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On a non-finite gradient, which never reaches the weights: end the run, or skip the step and count it."""


class Init(NamedTuple):
    """The model ``config.init``: all its `DiT` arguments and its ``sampling``."""

    arguments: dict[str, Any]
    sampling: dict[str, Any]


NEW = Init({}, {})  # start from new weights


def fill_defaults(config: Config, device: str, init: Init = NEW) -> Config:
    """Replace every None whose default depends on the data, the device or the initial model.

    Raises:
        TrainError: an unknown preset or objective.
    """
    default = None if init.arguments or config.data in BUILT_IN else "DiT-XL/2"
    name = default if config.model is None else config.model
    defaults = init.arguments or SMALL
    if name is not None:
        size, patch = _preset(name)
        defaults = {**SIZES[size], "patch_size": int(patch)}
    others = {
        "model": name,
        "conditioning": config.conditioning or init.arguments.get("conditioning", "adaln_zero"),
        **fill_objective(config, init.sampling),
    }
    chosen = {k: defaults[k] if getattr(config, k) is None else getattr(config, k) for k in ARCHITECTURE}
    workers = config.workers
    if workers is None:  # built-in samples are generated faster than a step runs
        workers = 0 if config.data in BUILT_IN else min(4, os.cpu_count() or 1)
    precision = config.precision or ("bf16" if device.startswith("cuda") else "fp32")
    filled: dict[str, Any] = {"precision": precision, "workers": workers, **chosen, **others}
    return replace(config, **filled)


def _preset(name):
    if name not in DiT_models:
        hint = did_you_mean(name, DiT_models)
        raise TrainError(f"--model must be one of {', '.join(DiT_models)}, got {name!r}{hint}")
    return name.removeprefix("DiT-").split("/")


def check_paths(config: Config) -> None:
    """Reject paths that the system does not accept.

    Raises:
        TrainError: naming the option.
    """
    for name in ("data", "vae", "init", "out", "resume"):
        value = getattr(config, name)
        if value is not None and (reason := why_unusable(value)):
            raise TrainError(f"--{name} {reason}")


def check_config(config: Config, world: int) -> None:
    """Reject invalid values in a config with defaults filled in.

    Args:
        world: number of ranks.

    Raises:
        TrainError: naming the option, the rule and the value.
    """
    least = {"steps": 1, "batch": 1, "accumulate": 1, "save_every": 1, "log_every": 1, "sample_steps": 1, "keep": 1}
    least |= {"workers": 0, "warmup": 0, "sample_every": 0, "seed": 0, **dict.fromkeys(ARCHITECTURE, 1)}
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise TrainError(f"{option_of(name)} must be at least {low}, got {value}")
    most = {"batch": 2**20, "workers": MOST_WORKERS, "seed": 2**64 - 1, "sample_steps": 1000}
    for name, high in most.items():
        if getattr(config, name) > high:
            raise TrainError(f"{option_of(name)} must be at most {high}, got {getattr(config, name)}")
    for name, limit in (("label_drop", 1), ("ema", 1), ("lr", math.inf), ("weight_decay", math.inf)):
        if not 0 <= getattr(config, name) < limit:
            raise TrainError(f"{option_of(name)} must be in [0, {limit}), got {getattr(config, name)}")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise TrainError(f"--betas must be two numbers in [0, 1), got {config.betas[0]} {config.betas[1]}")
    check_objective(config)
    if config.clip is not None and not 0 < config.clip < math.inf:
        raise TrainError(f"--clip must be positive, got {config.clip}")
    assert config.cfg is not None and config.hidden_size is not None and config.num_heads is not None  # filled in
    if not 1 <= config.cfg < math.inf:
        raise TrainError(f"--cfg must be at least 1, got {config.cfg}")
    if config.batch % (world * config.accumulate):
        raise TrainError(
            f"--batch must be a multiple of ranks x accumulate = {world} x {config.accumulate}, got {config.batch}"
        )
    if config.cfg > 1 and config.label_drop == 0 and config.sample_every:
        raise TrainError(f"--cfg {config.cfg:g} needs a null label, which --label-drop 0 omits: use --cfg 1")
    if config.label_drop == 0 and (config.target_cfg != 1 or config.target_mix):
        raise TrainError(f"--target-cfg {config.target_cfg:g} needs a null label, which --label-drop 0 omits")
    if config.hidden_size % config.num_heads or config.hidden_size % 4:
        raise TrainError(
            f"--hidden-size must be a multiple of 4 and of --num-heads {config.num_heads}, got {config.hidden_size}"
        )


def model_arguments(
    config: Config, shape: tuple[int, int, int], num_classes: int, init: Init = NEW
) -> dict[str, Any]:
    """Arguments of `DiT` for samples of ``shape`` (C, H, W); those without an option are as in ``init``.

    Raises:
        TrainError: naming the option that does not match the samples or the model.
    """
    channels, *size = shape
    assert config.patch_size is not None  # filled in
    if any(side % config.patch_size for side in size):
        raise TrainError(f"--patch-size must divide samples of {size[0]} x {size[1]}, got {config.patch_size}")
    arguments = {
        **init.arguments,
        "input_size": size[0] if size[0] == size[1] else tuple(size),
        "in_channels": channels,
        "num_classes": num_classes,
        "class_dropout_prob": config.label_drop,
        **{name: getattr(config, name) for name in ARCHITECTURE},
        **{name: getattr(config, name) for name in ("learn_sigma", "conditioning", "backend", "recompute_mlp")},
        "second_time": config.objective == "meanflow",
    }
    with by_option(ValueError, TrainError, *arguments.keys() & {field.name for field in fields(Config)}):
        check_arguments(arguments)
    return arguments
