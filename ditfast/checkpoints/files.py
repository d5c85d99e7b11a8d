"""Read weights from files without executing anything in them."""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ditfast.checkpoints.network import why_no_answer
from ditfast.checkpoints.pickles import read_pickle, reading
from ditfast.suggest import did_you_mean

RELEASED = ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
URL = "https://dl.fbaipublicfiles.com/DiT/models/"
WRAPPERS = (
    "module",
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
)  # prefixes of names, see `unwrap`


class Content(NamedTuple):
    weights: dict[str, torch.Tensor]  # may be memory-mapped
    args: dict  # of the training script; {} if the file has none


def find_model(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Load the weights in a file, on the CPU.

    Args:
        path: a bare state dict, a training checkpoint of the original ({"model", "ema", "opt", "args"}; "ema" is
            preferred), or a .safetensors file. A name in `RELEASED` that is not a file here is downloaded, once, to
            torch.hub's folder.

    Returns:
        The state dict. Its tensors do not depend on the file; its names are the model's own, without the prefixes of
        DDP, torch.compile and other wrappers.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read or downloaded.
        ValueError: the file is truncated, has no weights, or reading it would execute code.
    """
    path = Path(path)
    if is_released(path):
        return _download(path.name)
    return {name: value.clone() for name, value in read_file(path).weights.items()}


def is_released(path: Path) -> bool:
    """Whether this is the name of a download, and not an existing file."""
    return str(path) in RELEASED and not path.exists()


def read_file(path: Path) -> Content:
    """The weights of `find_model`, memory-mapped if possible, and the ``args`` beside them."""
    if is_released(path):
        return Content(_download(path.name), {})
    if not path.is_file():
        text = f"no file {str(path)!r}; downloadable names: {', '.join(RELEASED)}"
        raise FileNotFoundError(text + suggest_source(path))
    try:
        _refuse_text(path)
        content = _read_safetensors(path) if path.suffix == ".safetensors" else read_pickle(path)
    except OSError as error:
        if str(path) in str(error):
            raise
        raise OSError(f"{path} cannot be read: {error}") from error
    weights = _weights(path, content)
    _check_bytes(path, weights)
    return Content(unwrap(weights), _args(content))


def near_path(path: Path) -> Path | None:
    """The existing path most similar to one that does not exist."""
    folder = path.parent if path.parent.is_dir() else path.parent.name and near_path(path.parent)
    if not folder or not os.access(folder, os.R_OK) or not folder.is_dir():
        return None
    near = get_close_matches(path.name, os.listdir(folder), n=1, cutoff=0.6)
    return folder / near[0] if near else None


def suggest_source(path: Path) -> str:
    """The end of an error about a missing path: a suggestion, or nothing."""
    near = near_path(path)
    return f"; did you mean {str(near)!r}?" if near else did_you_mean(path, RELEASED, cutoff=0.6)


def _download(name):
    """The weights in torch.hub's folder, downloaded if they are not there yet."""
    kept = Path(torch.hub.get_dir(), "checkpoints", name)
    is_kept = kept.exists()
    try:
        if not is_kept and (why := why_no_answer(URL + name)):
            raise OSError(why)
        with reading(name):
            return torch.hub.load_state_dict_from_url(URL + name, map_location="cpu", weights_only=True)
    except OSError as error:
        if is_kept:
            raise
        raise OSError(
            f"there is no file {name} here, and {URL}{name} could not be downloaded: {error}; "
            f"download it where there is a network, to this folder or to {kept}"
        ) from error


def _refuse_text(path):
    """Reject what is often found in place of weights."""
    with open(path, "rb") as file:
        start = file.read(40).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull")
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page, not weights: the download failed")


def _read_safetensors(path):
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _weights(path, content):
    """The state dict in a file's content, preferably the averaged one."""
    if isinstance(content, dict):
        content = next((content[key] for key in ("ema", "model") if isinstance(content.get(key), dict)), content)
        if content and all(isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()):
            return content
    raise ValueError(f"{path} has no weights: neither a state dict of tensors nor one under 'ema' or 'model'")


def _check_bytes(path, weights):
    """Reject tensors larger than the file: an expanded tensor stores a single number."""
    held = path.stat().st_size
    if sum(value.numel() * value.element_size() for value in weights.values()) > held:
        name, value = max(weights.items(), key=lambda each: each[1].numel())
        raise ValueError(
            f"{path} claims more numbers than its {held} bytes can hold, the most in {name} {tuple(value.shape)}"
        )


def unwrap(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict under the model's own names, without wrappers.

    A wrapper of the whole model prefixes every name, one of a block is inside some. "module" may also be the model's
    own name, so it is only removed if every name starts with it. Covers torch's AveragedModel.
    """
    names = {name: unwrapped_name(name).split(".") for name in state if name != "n_averaged"}
    while names and all(parts[0] == WRAPPERS[0] and len(parts) > 1 for parts in names.values()):
        names = {name: parts[1:] for name, parts in names.items()}
    return {".".join(parts): state[name] for name, parts in names.items()}


def unwrapped_name(name: str) -> str:
    """A weight's or module's name without the wrappers of blocks."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS[1:])


def _args(content):
    args = content.get("args") if isinstance(content, dict) else None
    return args if isinstance(args, dict) else dict(getattr(args, "__dict__", {}))
