"""Models from checkpoints and back."""

import inspect
import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import save_file

from ditfast.atomic import atomic_write
from ditfast.checkpoints.convert import config_from_diffusers, from_diffusers, is_diffusers
from ditfast.checkpoints.files import is_released, read_file, suggest_source
from ditfast.checkpoints.folders import download, is_hub_name, read_config, read_folder
from ditfast.checkpoints.infer import SECOND_TIME, TABLE, argument, check_model_config, grid_of, infer_file
from ditfast.checkpoints.labels import fit_labels
from ditfast.checkpoints.position import regrid
from ditfast.checkpoints.sampling import check_sampling, recorded_by_sit, settle_objective
from ditfast.models.dit import DiT
from ditfast.models.limits import check_arguments
from ditfast.models.meta import on_meta
from ditfast.ops.checks import FLOATING

HOW_IT_RUNS = ("backend", "recompute_mlp")  # arguments that are no property of the weights


def from_pretrained(source, *, subfolder="", variant="", objective=None, cls: type = DiT, **changes):
    """A model from its weights, in evaluation mode, in the dtype of the weights, on the CPU.

    Args:
        source: a folder that `save_pretrained` or diffusers' DiTTransformer2DModel wrote, such a repository on the
            Hugging Face Hub ("owner/name"), or a file or released name for `find_model`, whose config is then told
            from its weights (`infer_config`) and from the ``args`` that a training checkpoint keeps.
        subfolder: where in the folder or repository the model is; "transformer" in a pipeline of diffusers.
        variant: of the files of weights, as "fp16" in model.fp16.safetensors. One that is alone need not be named.
        objective: what the model was trained for, "diffusion", "flow" or "meanflow", where the checkpoint does not
            say so: the files of SiT have the weights of a DiT by name. None: what it says, or else diffusion.
        cls: `DiT` or a subclass.
        changes: arguments of ``cls`` that replace those of the config. With another ``input_size`` the position
            embedding is computed anew. With another ``num_classes`` the labels' rows are new, drawn by torch's
            global generator; the null label's and all other weights are kept, and a warning says so.

    Raises:
        FileNotFoundError: there is no such file, folder or repository.
        ValueError: a file is broken, unsafe, of another model or of another objective; an unknown argument.
        ImportError: a package of the extra ``train`` is needed.

    diffusers' DiT is another function than the original (see `from_diffusers`). Official weights that were stored in
    its format become the original's again with ``timestep_freq_shift=0, norm2_eps=1e-6``.
    """
    where = {"subfolder": subfolder, "variant": variant}
    model, said = read_model(source, **where, objective=objective, cls=cls, **changes)
    if said:
        warnings.warn(said, stacklevel=3)
    return model


def read_model(source, *, subfolder="", variant="", objective=None, cls: type = DiT, **changes):
    """What `from_pretrained` returns, and a line about rows of labels that the checkpoint does not have, or None."""
    stored, sampling, state = _read(source, subfolder, variant, changes)
    config = check_model_config({**stored, **changes}, cls)
    check_arguments(stored)  # also what a change replaces: the weights are of its shapes
    with on_meta():  # neither memory nor time for values that are replaced
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
    return model.eval(), said


def read_source(source, **known) -> tuple[dict, dict]:
    """The arguments of the `DiT` behind a source of `from_pretrained`, and its ``sampling``, {} if it has none.

    Args:
        known: arguments that the weights in a file may not tell, as of `infer_config`.
    """
    path = _locate(source)
    if path.is_file() or is_released(path):
        weights, args = read_file(path)
        config, sampling = infer_file(weights, args, known), _sampling_of(weights, args)
    else:
        config = read_config(path)
        sampling = _take_sampling(config)
        config = config_from_diffusers(config) if is_diffusers(config) else check_model_config(config, DiT)
    return {**_defaults(), **config}, sampling


def read_sampling(source, *, subfolder: str = "") -> dict:
    """What a source of `from_pretrained` says as ``sampling``, {} if it says nothing: a config, or what a file tells.

    Raises:
        FileNotFoundError, ValueError: as `from_pretrained`.
    """
    path = _locate(source, subfolder)
    if is_released(path):
        return {}
    if path.is_file():
        return _sampling_of(*read_file(path))
    return _take_sampling(read_config(path))


def load_into(model: torch.nn.Module, state: dict) -> None:
    """Give a model all of its weights, or raise and leave it as it was.

    A model on the meta device takes the tensors themselves, with their dtype; another copies them.

    Raises:
        ValueError: names, shapes or kinds of numbers differ; the first that does is named.
    """
    own = model.state_dict()
    differing = [
        name for name in (*own, *sorted(state.keys() - own.keys())) if _differs(own.get(name), state.get(name))
    ]
    if differing:
        name, more = differing[0], len(differing) - 1
        raise ValueError(
            f"the weights do not fit the model: {name} is {_describe(state.get(name))} in the weights, "
            f"{_describe(own.get(name))} in the model" + (f"; {more} more differ" if more else "")
        )
    model.load_state_dict(state, assign=any(value.is_meta for value in own.values()))


def save_pretrained(model: DiT, folder, *, overwrite: bool = False) -> None:
    """Write config.json and model.safetensors, for `from_pretrained`.

    Both are written under other names first, so that a full disk leaves what was there. The config is
    ``model.config`` without ``backend`` and ``recompute_mlp``, which are not about the weights, and ``sampling``.

    Raises:
        ValueError: ``model.sampling`` says what cannot be.
        FileExistsError: one of the files exists, and ``overwrite`` is false.
    """
    sampling = check_sampling(model.sampling, model.config)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights_file, config_file = folder / "model.safetensors", folder / "config.json"
    for file in (weights_file, config_file):
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists; overwrite=True replaces it")
    config = {name: value for name, value in model.config.items() if name not in HOW_IT_RUNS} | {"sampling": sampling}
    with (
        atomic_write(config_file, concurrent=True) as config_part,
        atomic_write(weights_file, concurrent=True) as part,
    ):
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, part, metadata={"format": "pt"})
        config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _read(source, subfolder, variant, changes):
    """The config, its ``sampling`` and the weights behind ``source``, in the format of this package."""
    path = _locate(source, subfolder, variant)
    if path.is_file() or is_released(path):
        weights, args = read_file(path)
        config, sampling = infer_file(weights, args, changes), _sampling_of(weights, args)
        return config, sampling, {name: value.clone() for name, value in weights.items()}  # not the file's
    config, state = read_folder(path, variant)
    if is_diffusers(config):
        config, state = from_diffusers(config, state)
    return config, _take_sampling(config), state


def _locate(source, subfolder="", variant=""):
    """The file or folder that a source means, here or downloaded; a released name stays one."""
    path = Path(source)
    if path.is_file() or is_released(path):
        return path
    if not path.exists():
        if not is_hub_name(source):
            text = f"{str(source)!r} is no file, no folder and no name on the Hugging Face Hub"
            raise FileNotFoundError(text + suggest_source(path))
        path = download(source, subfolder, variant)
    return path / subfolder


def _sampling_of(weights, args):
    """What a file tells, which has no config."""
    return {"objective": "meanflow"} if SECOND_TIME in weights else recorded_by_sit(args)


def _take_sampling(config):
    """``sampling``, taken out of a config: it is no argument of the model."""
    if "sampling" not in config:
        return {}
    sampling = config.pop("sampling")
    check_arguments(config)
    return check_sampling(sampling, {**_defaults(), **config})


def _defaults():
    return {name: each.default for name, each in inspect.signature(DiT).parameters.items()}


def _differs(own, given):
    return own is None or given is None or own.shape != given.shape or given.dtype not in FLOATING


def _describe(tensor):
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
