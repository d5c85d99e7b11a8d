"""Read weights from files, without executing anything that is in them."""

import argparse
import json
import pickle
import re
import zipfile
from pathlib import Path, PurePosixPath

import torch

from ditfast.optional import import_optional

RELEASED = ("DiT-XL-2-256x256.pt", "DiT-XL-2-512x512.pt")
URL = "https://dl.fbaipublicfiles.com/DiT/models/"
WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def find_model(path) -> dict[str, torch.Tensor]:
    """The weights in a file, on the CPU.

    Args:
        path: a bare state dict, a training checkpoint of the original ({"model", "ema", "opt", "args"}; "ema" is
            preferred), or a .safetensors file. A name in `RELEASED` that is no file here is downloaded, once, to
            torch.hub's folder.

    Returns:
        The state dict. Its tensors are independent of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, holds no weights, or would have to execute code to be read.
        ImportError: a .safetensors file without the package safetensors.
    """
    path = Path(path)
    if not path.is_file():
        if str(path) not in RELEASED:
            raise FileNotFoundError(f"no file {str(path)!r}; names that are downloaded: {', '.join(RELEASED)}")
        return torch.hub.load_state_dict_from_url(URL + path.name, map_location="cpu", weights_only=True)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return {name: value.clone() for name, value in _weights(path, content).items()}  # the file may be mapped


def read_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """config.json and the weights of a folder, this package's or diffusers'."""
    weights = _first(folder, *WEIGHTS)
    path = _first(folder, "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config, find_model(weights)


def download(repo: str, subfolder: str = "") -> Path:
    """The folder of a repository on the Hugging Face Hub, of which only the model is downloaded, once."""
    hub = import_optional("huggingface_hub")
    wanted = [str(PurePosixPath(subfolder, name)) for name in ("config.json", *WEIGHTS)]
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # the bases of the hub's errors: network, no such repository, bad name
        raise FileNotFoundError(
            f"{repo!r} is no file or folder here, and could not be read from the Hugging Face Hub: {error}"
        ) from error


def _first(folder, *names):
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{str(folder)!r} holds no {' or '.join(names)}")


def _read_safetensors(path):
    load, broken = import_optional("safetensors.torch").load_file, import_optional("safetensors").SafetensorError
    try:
        return load(path)
    except broken as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error


def _read_pickle(path):
    """What torch.save wrote; besides tensors and plain values only an argparse.Namespace may be in it."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            # mapped, because a training checkpoint is four times as large as the weights that are wanted
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if called := re.search(r"GLOBAL (\S+)|function (\S+)", str(error)):
            name = called[1] or called[2]
            raise ValueError(f"{path} is refused: reading it would run {name}; nothing was executed") from error
        raise ValueError(f"{path} is truncated or no checkpoint: {error}") from error
    except Exception as error:  # a broken file can raise anything: RuntimeError, EOFError, KeyError, struct.error, …
        raise ValueError(f"{path} is truncated or no checkpoint: {error!r}") from error


def _weights(path, content):
    """The state dict in what a file holds, its average first."""
    if isinstance(content, dict):
        content = next((content[key] for key in ("ema", "model") if isinstance(content.get(key), dict)), content)
        if content and all(isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()):
            return content
    raise ValueError(f"{path} holds no weights: neither a state dict of tensors nor one under 'ema' or 'model'")
