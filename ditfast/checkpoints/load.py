"""Load models from checkpoints, and save them."""

import inspect
import json
import os
import warnings
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file

from ditfast.atomic import atomic_write
from ditfast.checkpoints.convert import config_from_diffusers, from_diffusers, is_diffusers
from ditfast.checkpoints.differences import check_savable, first_difference
from ditfast.checkpoints.files import RELEASED, is_released, read_file, suggest_source
from ditfast.checkpoints.folders import download, is_hub_name, read_config, read_folder
from ditfast.checkpoints.infer import SECOND_TIME, TABLE, argument, check_model_config, grid_of, infer_file
from ditfast.checkpoints.labels import fit_labels
from ditfast.checkpoints.pipelines import VAE, has_vae, model_folder
from ditfast.checkpoints.position import regrid
from ditfast.checkpoints.sampling import check_sampling, recorded_by_sit, settle_objective
from ditfast.models.dit import DiT
from ditfast.models.limits import check_arguments
from ditfast.models.meta import on_meta

RELEASED_SAMPLING = {"objective": "diffusion", "noise_schedule": "linear"}
HOW_IT_RUNS = ("backend", "recompute_mlp")  # arguments that do not concern the weights


def from_pretrained(
    source: str | os.PathLike,
    *,
    subfolder: str = "",
    variant: str = "",
    objective: str | None = None,
    cls: type[DiT] = DiT,
    **changes: Any,
) -> DiT:
    """Load a model, in evaluation mode, in the dtype of the weights, on the CPU.

    Args:
        source: a folder written by `save_pretrained`, diffusers' DiTTransformer2DModel or a pipeline that has one,
            such a repository on the Hugging Face Hub ("owner/name"), or a file or released name for `find_model`. A
            file's config is inferred from its weights (`infer_config`) and the ``args`` in a training checkpoint.
        subfolder: the model's place in the folder or repository. That in a diffusers pipeline is known.
        variant: of the weights files, such as "fp16" in model.fp16.safetensors. The only one need not be named.
        objective: the training objective, "diffusion", "flow" or "meanflow", if the checkpoint does not record it:
            SiT's files have a DiT's weight names. Its fields have their defaults, such as the linear noise schedule.
            None for the recorded one; if there is none, ``sampling`` is {}.
        cls: `DiT` or a subclass.
        changes: arguments of ``cls`` that override the config, or complete what is inferred from a file:
            ``class_dropout_prob=0`` says that the label table of a bare state dict has no row for the null label;
            otherwise the last row is taken for it, with a warning. A new ``input_size`` recomputes the position
            embedding. A new ``num_classes`` redraws the labels' rows from torch's global generator and keeps the
            null label's and all other weights, with a warning.

    Raises:
        FileNotFoundError: the file, folder or repository does not exist.
        ValueError: a file is broken, unsafe, of another model or of another objective; an unknown argument.
        ImportError: a package for the Hub is missing.

    diffusers' DiT computes a different function than the original (see `convert`). For official weights stored in its
    format, pass ``timestep_freq_shift=0, norm2_eps=1e-6`` to restore the original's.
    """
    where: dict[str, Any] = {"subfolder": subfolder, "variant": variant, "objective": objective, "cls": cls}
    model, said = read_model(source, **where, **changes)
    if said:
        warnings.warn(said, stacklevel=3)
    return model


def read_model(
    source: str | os.PathLike,
    *,
    subfolder: str = "",
    variant: str = "",
    objective: str | None = None,
    cls: type[DiT] = DiT,
    **changes: Any,
) -> tuple[DiT, str | None]:
    """The model of `from_pretrained`, and a line about assumed or missing rows of labels, or None."""
    stored, sampling, state, assumed = _read(source, subfolder, variant, changes)
    config = check_model_config({**stored, **changes}, cls)
    check_arguments(stored)  # including overridden ones: they give the shapes of the weights
    with on_meta():  # no memory or time for values that will be replaced
        model = cls(**config)
    if "pos_embed" in state:
        state["pos_embed"] = regrid(state["pos_embed"], grid_of(stored), grid_of(config))
    said = None
    if TABLE in state:
        state[TABLE], said = fit_labels(state[TABLE], stored, config)
    load_into(model, state)
    model.sampling = settle_objective(sampling, objective, model.sampling)
    if argument(stored, "num_classes") != argument(config, "num_classes"):
        model.sampling.pop("classes", None)
    check_sampling(model.sampling, model.config)
    return model.eval(), "; ".join(filter(None, (assumed, said))) or None


def read_source(source: str | os.PathLike, **known: Any) -> tuple[dict, dict]:
    """The arguments of the `DiT` behind a source of `from_pretrained`, and its ``sampling``, {} if it has none.

    Args:
        known: arguments that a file's weights may not determine, see `infer_config`.
    """
    path = _locate(source)
    if path.is_file() or is_released(path):
        weights, args = read_file(path)
        (config, _), sampling = _infer(path, weights, args, known), _sampling_of(path, weights, args)
    else:
        config = read_config(path)
        sampling = _take_sampling(config)
        config = config_from_diffusers(config) if is_diffusers(config) else check_model_config(config, DiT)
    return {**_defaults(), **config}, sampling


def read_sampling(source: str | os.PathLike, *, subfolder: str = "") -> dict:
    """The ``sampling`` of a source of `from_pretrained`, from its config or file; {} if it has none.

    Raises:
        FileNotFoundError, ValueError: see `from_pretrained`.
    """
    path = _locate(source, subfolder)
    if is_released(path):
        return dict(RELEASED_SAMPLING)
    if path.is_file():
        return _sampling_of(path, *read_file(path))
    return _take_sampling(read_config(path))


def vae_beside(source: str) -> str | None:
    """The autoencoder, for `load_vae`, of a source that is a diffusers pipeline, local or on the Hub; else None."""
    path = Path(source)
    if not path.exists() and is_hub_name(source):
        path = _locate(source).parent  # of the transformer
    return str(PurePosixPath(source, VAE)) if has_vae(path) else None


def load_into(model: torch.nn.Module, state: dict) -> None:
    """Load all weights into a model, or raise and leave it unchanged.

    A model on the meta device takes over the tensors, with their dtype; any other copies them.

    Raises:
        ValueError: names, shapes or kinds of dtype differ; the first difference is named.
    """
    own = model.state_dict()
    if found := first_difference(state, own, "the weights", "the model"):
        raise ValueError(f"the weights do not fit the model: {found}")
    model.load_state_dict(state, assign=any(value.is_meta for value in own.values()))


def save_pretrained(model: DiT, folder: str | os.PathLike, *, overwrite: bool = False) -> None:
    """Write config.json and model.safetensors, for `from_pretrained`.

    Both are written atomically, so that a full disk does not damage existing files. The config is ``model.config``
    without ``backend`` and ``recompute_mlp``, which do not concern the weights, plus ``sampling`` unless it is {}:
    samplers then say what they assume.

    Raises:
        ValueError: ``model.sampling`` is invalid, or the model is not the one that its config builds: one with
            adapters, replaced parts or changed settings would be loaded as another, or not at all. What was trained
            is not lost: its weights are then in the folder's modified.safetensors.
        FileExistsError: one of the files exists and ``overwrite`` is false.
    """
    sampling = check_sampling(model.sampling, model.config)
    config = {name: value for name, value in model.config.items() if name not in HOW_IT_RUNS}
    folder = Path(folder)
    try:
        weights = check_savable(model, config)
    except ValueError as error:
        raise ValueError(f"{error}; its weights are now in {_rescue(model, folder)}") from None
    folder.mkdir(parents=True, exist_ok=True)
    weights_file, config_file = folder / "model.safetensors", folder / "config.json"
    for file in (weights_file, config_file):
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists; overwrite=True replaces it")
    config |= {"sampling": sampling} if sampling else {}
    with (
        atomic_write(config_file, concurrent=True) as config_part,
        atomic_write(weights_file, concurrent=True) as part,
    ):
        save_file({k: v.contiguous() for k, v in weights.items()}, part, metadata={"format": "pt"})
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _rescue(model, folder):
    """The file with the weights of a model that cannot be loaded from a folder: a script may end with the error."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file := folder / "modified.safetensors", concurrent=True) as part:
        save_file({k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}, part)
    return file


def _read(source, subfolder, variant, changes):
    """The config, its ``sampling``, the weights behind ``source`` in this package's format, and what is assumed."""
    path = _locate(source, subfolder, variant)
    if path.is_file() or is_released(path):
        weights, args = read_file(path)
        (config, assumed), sampling = _infer(path, weights, args, changes), _sampling_of(path, weights, args)
        return config, sampling, {name: value.clone() for name, value in weights.items()}, assumed  # not the file's
    config, state = read_folder(path, variant)
    if is_diffusers(config):
        config, state = from_diffusers(config, state)
    return config, _take_sampling(config), state, None


def _locate(source, subfolder="", variant=""):
    """The file or folder of a source, local or downloaded; a released name is returned as is."""
    path = Path(source)
    if path.is_file() or is_released(path):
        return path
    if not path.exists():
        if not is_hub_name(source):
            text = f"{str(source)!r} is not a file, a folder or a name on the Hugging Face Hub"
            raise FileNotFoundError(text + suggest_source(path))
        path = download(source, subfolder, variant)
    return model_folder(path / subfolder)


def _infer(path, weights, args, known):
    """`infer_file`, with what is known about the released weights."""
    return infer_file(weights, {"num_classes": 1000, **args} if path.name in RELEASED else args, known)


def _sampling_of(path, weights, args):
    """The ``sampling`` of a file, which has no config."""
    if SECOND_TIME in weights:
        return {"objective": "meanflow"}
    return recorded_by_sit(args) or (dict(RELEASED_SAMPLING) if path.name in RELEASED else {})


def _take_sampling(config):
    """Pop ``sampling`` from a config: it is not an argument of the model."""
    if "sampling" not in config:
        return {}
    sampling = config.pop("sampling")
    check_arguments(config)
    return check_sampling(sampling, {**_defaults(), **config})


def _defaults():
    return {name: each.default for name, each in inspect.signature(DiT).parameters.items()}
