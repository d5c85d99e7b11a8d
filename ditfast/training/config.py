"""What a run is: one dataclass, from flags and a YAML file."""

import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from reprlib import repr as short
from typing import Literal, NamedTuple

from ditfast.data.sources import BUILT_IN
from ditfast.data.stream import MOST_WORKERS
from ditfast.models.limits import check_arguments
from ditfast.models.presets import SIZES, DiT_models
from ditfast.optional import import_optional
from ditfast.paths import why_unusable
from ditfast.small_files import read_text
from ditfast.suggest import did_you_mean
from ditfast.training import TrainError
from ditfast.training.objective import check_objective, fill_objective

SMALL = {"depth": 4, "hidden_size": 96, "num_heads": 3, "patch_size": 2}  # enough for digits and glyphs
ARCHITECTURE = tuple(SMALL)
YES, NO, NULL = ("true", "yes", "on"), ("false", "no", "off"), ("", "~", "null", "Null", "NULL")  # in YAML


@dataclass(frozen=True)
class Config:
    """Train a DiT. Defaults are the paper's (section 4, "Training")."""

    data: str = "digits"
    """digits, glyphs, a folder with a folder of images for each class, or a folder that ditfast.encode wrote."""
    image_size: int | None = None
    """Pixels of images and glyphs; a must for images."""
    vae: str | None = None
    """ema, mse or the folder of an AutoencoderKL: encodes images in every step, decodes the grids of samples."""
    num_classes: int | None = None
    """If given, the data must have as many."""
    flip: bool = True
    """Mirror images and latents at random."""
    workers: int | None = None
    """Processes that read data, for each rank: none for digits and glyphs, else 4, but no more than cores."""
    unreadable: Literal["fail", "skip"] = "fail"
    """What an image that cannot be read does: end the run, or count and be replaced by the next."""

    init: str | None = None
    """A model to start from: a folder, a file, a released name or a name on the Hub. The run takes its architecture;
    for another number of classes the labels' rows are new."""
    model: str | None = None
    """A preset such as DiT-B/4. DiT-XL/2 for images and latents, a small model for digits and glyphs."""
    depth: int | None = None
    """Instead of the preset's, like the next three."""
    hidden_size: int | None = None
    num_heads: int | None = None
    patch_size: int | None = None
    conditioning: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] | None = None
    """adaln_zero, or what --init has."""
    label_drop: float = 0.1
    """How often the null label takes a label's place, for classifier-free guidance."""
    learn_sigma: bool = True
    """Predict a variance too; flows train only the other half of the channels, as SiT does."""

    objective: Literal["diffusion", "flow", "meanflow"] | None = None
    """What is trained: diffusion, or what --init was trained for."""
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] | None = None
    """Of diffusion: linear, or what --init was trained with."""
    path_type: Literal["Linear", "GVP", "VP"] | None = None
    """Of a flow: Linear, or what --init was trained with."""
    prediction: Literal["velocity", "noise", "score"] | None = None
    """Of a flow: velocity, or what --init was trained with."""
    loss_weight: Literal["velocity", "likelihood"] | None = None
    """Of a flow that predicts noise or score."""
    time_sampling: Literal["uniform", "logit-normal"] | None = None
    """Of flows: uniform; for meanflow logit-normal."""
    time_mean: float | None = None
    """Of the normal: 0; for meanflow 0.4. Time is 0 at noise and 1 at data."""
    time_std: float = 1.0
    time_shift: float = 1.0
    """Of a flow: train more on noise, as larger images need."""
    interval_ratio: float = 0.25
    """Of meanflow: how often it trains on an average and not on the velocity at one time."""
    adaptive_power: float = 1.0
    """Of meanflow: p in the weight (error² + c)^-p of a sample's squared error."""
    target_cfg: float = 1.0
    """Of meanflow: the guidance that the model learns, so that one call of it is guided."""
    target_mix: float = 0.0
    """Of meanflow: how much of that guidance is made of the model's own predictions."""
    target_from: float = 0.0
    """Of meanflow: guide only from this time on."""

    steps: int = 400_000
    batch: int = 256
    """Samples of a step, all ranks together."""
    accumulate: int = 1
    """Passes that make a step, for batches that do not fit."""
    lr: float = 1e-4
    warmup: int = 0
    """Steps in which the learning rate rises to lr."""
    weight_decay: float = 0.0
    clip: float | None = None
    """Largest norm of the gradient."""
    ema: float = 0.9999
    """Decay of the average of the weights, which starts as the weights."""
    ema_warmup: Literal["auto", "on", "off"] = "auto"
    """Begin with a smaller decay, (1 + t) / (10 + t) at step t. auto: in runs of fewer than 5 / (1 - ema) steps."""
    seed: int = 0
    """All randomness follows from it and the number of the step."""

    precision: Literal["fp32", "bf16", "pure_bf16"] | None = None
    """bf16 is autocast; pure_bf16 keeps float32 masters and computes all in bf16. fp32 without a GPU, else bf16."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: whole weights on every rank, or FSDP2's shares of them."""
    checkpointing: Literal["none", "full"] = "none"
    """full computes every block again in backward instead of keeping its activations."""
    recompute_mlp: bool = False
    """Compute only the MLPs' activations again."""
    compile: bool = False
    """torch.compile."""
    backend: str | None = None
    """Of ditfast's operations, such as reference."""

    out: str = "runs/train"
    """Folder of the run."""
    resume: str | None = None
    """auto goes on with the run in the folder, if there is one; or a checkpoint."""
    take_over: bool = False
    """Take the folder from a run that is gone: of another host that cannot be told."""
    save_every: int = 50_000
    keep: int = 3
    """Checkpoints that stay."""
    log_every: int = 100
    sample_every: int = 10_000
    """Steps between grids of samples of the average; 0 for none."""
    sample_steps: int | None = None
    """Steps of the grids' sampler: 50; for meanflow 1."""
    cfg: float | None = None
    """Guidance of the grids: 4; for meanflow 1, because its models learn it."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a gradient that is not finite does, which never reaches the weights: end the run, or be counted."""


def flags_from_yaml(path) -> list[str]:
    """The options in a YAML file, as flags, so that a file is checked as flags are.

    Raises:
        TrainError: no such file, no mapping, an unknown name.
    """
    try:
        yaml = import_optional("yaml")
        found = yaml.load(read_text(path), yaml.BaseLoader) or {}  # all as text: on is no bool, 007 no 7
    except RecursionError as error:
        raise TrainError(f"--config {path} cannot be read: it is nested too deep") from error
    except (OSError, ValueError, import_optional("yaml").YAMLError) as error:
        raise TrainError(f"--config {path} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(found, dict):
        raise TrainError(f"--config {path} must hold names and values, got {type(found).__name__}")
    known, flags = {f.name: f.type for f in fields(Config)}, []
    for name, value in found.items():
        if name not in known:
            raise TrainError(f"--config {path}: unknown name {name!r}{did_you_mean(name, known)}")
        if not isinstance(value, str):
            raise TrainError(f"--config {path}: {name} must be one value, got {short(value)}")
        if value in NULL:  # the default
            continue
        flag = name.replace("_", "-")
        if known[name] is not bool:
            flags += [f"--{flag}", os.path.expanduser(value)]
        elif value.lower() in (*YES, *NO):
            flags.append(f"--{flag}" if value.lower() in YES else f"--no-{flag}")
        else:
            raise TrainError(f"--config {path}: {name} must be true or false, got {value!r}")
    return flags


def to_yaml(config: Config) -> str:
    kept = {name: value for name, value in asdict(config).items() if name != "take_over"}  # once, not each time
    return import_optional("yaml").safe_dump(kept, sort_keys=False)


class Init(NamedTuple):
    """The model in ``config.init``: all of its arguments of `DiT`, and its ``sampling``."""

    arguments: dict
    sampling: dict


NEW = Init({}, {})  # of a run that starts from new weights


def fill_defaults(config: Config, device: str, init: Init = NEW) -> Config:
    """The config with every None that depends on the data, the machine or the model to start from replaced."""
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
    if workers is None:  # a built-in sample is made in less time than a step takes
        workers = 0 if config.data in BUILT_IN else min(4, os.cpu_count() or 1)
    precision = config.precision or ("bf16" if device.startswith("cuda") else "fp32")
    return replace(config, precision=precision, workers=workers, **chosen, **others)


def _preset(name):
    if name not in DiT_models:
        hint = did_you_mean(name, DiT_models)
        raise TrainError(f"--model must be one of {', '.join(DiT_models)}, got {name!r}{hint}")
    return name.removeprefix("DiT-").split("/")


def check_paths(config: Config) -> None:
    """Refuse what the system takes for no path.

    Raises:
        TrainError: naming the option.
    """
    for name in ("data", "vae", "init", "out", "resume"):
        value = getattr(config, name)
        if value is not None and (reason := why_unusable(value)):
            raise TrainError(f"--{name} {reason}")


def check_config(config: Config, world: int) -> None:
    """Refuse values that cannot work, before anything is started.

    Raises:
        TrainError: naming the option, the rule and the value.
    """
    least = {"steps": 1, "batch": 1, "accumulate": 1, "save_every": 1, "log_every": 1, "sample_steps": 1, "keep": 1}
    least |= {"workers": 0, "warmup": 0, "sample_every": 0, "seed": 0, **dict.fromkeys(ARCHITECTURE, 1)}
    for name, low in least.items():
        value = getattr(config, name)
        if value is not None and value < low:
            raise TrainError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    most = {"batch": 2**20, "workers": MOST_WORKERS, "seed": 2**64 - 1, "sample_steps": 1000}
    for name, high in most.items():
        if getattr(config, name) > high:
            raise TrainError(f"--{name.replace('_', '-')} must be at most {high}, got {getattr(config, name)}")
    for name, high in (("label_drop", 1), ("ema", 1), ("lr", math.inf), ("weight_decay", math.inf)):
        if not 0 <= getattr(config, name) < high:
            raise TrainError(f"--{name.replace('_', '-')} must be in [0, {high}), got {getattr(config, name)}")
    check_objective(config)
    if config.clip is not None and not 0 < config.clip < math.inf:
        raise TrainError(f"--clip must be positive, got {config.clip}")
    if not 1 <= config.cfg < math.inf:
        raise TrainError(f"--cfg must be at least 1, got {config.cfg}")
    if config.batch % (world * config.accumulate):
        raise TrainError(
            f"--batch must be a multiple of ranks x accumulate = {world} x {config.accumulate}, got {config.batch}"
        )
    if config.cfg > 1 and config.label_drop == 0 and config.sample_every:
        raise TrainError(f"--cfg {config.cfg:g} needs a null label, which --label-drop 0 leaves out: --cfg 1")
    if config.label_drop == 0 and (config.target_cfg != 1 or config.target_mix):
        raise TrainError(f"--target-cfg {config.target_cfg:g} needs a null label, which --label-drop 0 leaves out")
    if config.hidden_size % config.num_heads or config.hidden_size % 4:
        raise TrainError(
            f"--hidden-size must be a multiple of 4 and of --num-heads {config.num_heads}, got {config.hidden_size}"
        )


def model_arguments(config: Config, shape, num_classes: int, init: Init = NEW) -> dict:
    """Arguments of `DiT` for samples of ``shape`` (C, H, W); those that no option names are as in ``config.init``."""
    channels, *size = shape
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
    try:
        check_arguments(arguments)
    except ValueError as error:
        raise TrainError(_as_option(error)) from error
    return arguments


def _as_option(error) -> str:
    """An error about an argument, as one about the option of that name."""
    return re.sub(r"^\w+", lambda name: f"--{name[0].replace('_', '-')}", str(error))
