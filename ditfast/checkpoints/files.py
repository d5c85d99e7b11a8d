"""Read weights from files, without executing anything that is in them."""

import os
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ditfast.checkpoints.pickles import read_pickle, reading
from ditfast.suggest import did_you_mean

RELEASED = ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
URL = "https://dl.fbaipublicfiles.com/DiT/models/"
WRAPPERS = ("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # of names: see `_unwrap`


class Content(NamedTuple):
    weights: dict[str, torch.Tensor]  # may be mapped: gone with the file
    args: dict  # of the script that trained them, as far as the file tells


def find_model(path) -> dict[str, torch.Tensor]:
    """The weights in a file, on the CPU.

    Args:
        path: a bare state dict, a training checkpoint of the original ({"model", "ema", "opt", "args"}; "ema" is
            preferred), or a .safetensors file. A name in `RELEASED` that is no file here is downloaded, once, to
            torch.hub's folder.

    Returns:
        The state dict. Its tensors are independent of the file. Their names are those of the model itself, without
        what DDP, torch.compile and other wrappers add to them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, holds no weights, or would have to execute code to be read.
        ImportError: a .safetensors file without the package safetensors.
    """
    path = Path(path)
    if is_released(path):
        return _download(path.name)
    return {name: value.clone() for name, value in read_file(path).weights.items()}


def is_released(path: Path) -> bool:
    """Whether this is a name to be downloaded, and no file here."""
    return str(path) in RELEASED and not path.exists()


def read_file(path: Path) -> Content:
    """What `find_model` finds, mapped where it can be, and the ``args`` beside it."""
    if is_released(path):
        return Content(_download(path.name), {})
    if not path.is_file():
        text = f"no file {str(path)!r}; names that are downloaded: {', '.join(RELEASED)}"
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
    return Content(_unwrap(weights), _args(content))


def near_path(path: Path) -> Path | None:
    """What is there and most like a path that is not."""
    folder = path.parent if path.parent.is_dir() else path.parent.name and near_path(path.parent)
    if not folder or not os.access(folder, os.R_OK) or not folder.is_dir():
        return None
    near = get_close_matches(path.name, os.listdir(folder), n=1, cutoff=0.6)
    return folder / near[0] if near else None


def suggest_source(path: Path) -> str:
    """The end of an error about a path that is not there: what may have been meant, or nothing."""
    near = near_path(path)
    return f"; did you mean {str(near)!r}?" if near else did_you_mean(path, RELEASED, cutoff=0.6)


def _download(name):
    with reading(name):
        return torch.hub.load_state_dict_from_url(URL + name, map_location="cpu", weights_only=True)


def _refuse_text(path):
    """Name what is often found in the place of weights."""
    with open(path, "rb") as file:
        start = file.read(40).lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the weights that it points to: git lfs pull")
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        raise ValueError(f"{path} is a web page: the download gave that instead of weights")


def _read_safetensors(path):
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _weights(path, content):
    """The state dict in what a file holds, its average first."""
    if isinstance(content, dict):
        content = next((content[key] for key in ("ema", "model") if isinstance(content.get(key), dict)), content)
        if content and all(isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()):
            return content
    raise ValueError(f"{path} holds no weights: neither a state dict of tensors nor one under 'ema' or 'model'")


def _check_bytes(path, weights):
    """Refuse tensors that are larger than the file: an expanded one takes up a single number of it."""
    held = path.stat().st_size
    if sum(value.numel() * value.element_size() for value in weights.values()) > held:
        name, value = max(weights.items(), key=lambda each: each[1].numel())
        raise ValueError(
            f"{path} claims more numbers than its {held} bytes can hold, the most in {name} {tuple(value.shape)}"
        )


def _unwrap(state):
    """The state dict under the names of the model itself.

    A wrapper around the whole model begins every name, one around a block is inside some; "module", which may be a
    name of the model's own, is taken away only at the beginning of all. torch's AveragedModel counts, too.
    """
    names = {name: name.split(".") for name in state if name != "n_averaged"}
    names = {name: [part for part in parts if part not in WRAPPERS[1:]] for name, parts in names.items()}
    while names and all(parts[0] == WRAPPERS[0] and len(parts) > 1 for parts in names.values()):
        names = {name: parts[1:] for name, parts in names.items()}
    return {".".join(parts): state[name] for name, parts in names.items()}


def _args(content):
    args = content.get("args") if isinstance(content, dict) else None
    return args if isinstance(args, dict) else dict(getattr(args, "__dict__", {}))
