"""Folders with a config and weights, local or on the Hugging Face Hub, in this package's or diffusers' format."""

import os
import re
from pathlib import Path, PurePosixPath

import torch

from ditfast.checkpoints.files import find_model, near_path
from ditfast.checkpoints.network import one_line, why_no_hub
from ditfast.checkpoints.pipelines import INDEX, model_folder
from ditfast.optional import import_optional
from ditfast.small_files import read_object

WEIGHTS = ("model.safetensors", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
ENDINGS = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")  # of files, never of repositories


def read_folder(folder: Path, variant: str = "") -> tuple[dict, dict[str, torch.Tensor]]:
    """Read config.json and the weights of a folder.

    Weights may be in one file, or in several that an index lists. A variant, such as "fp16", is read if requested, or
    if it is the only one.
    """
    files, config = _find_weights(folder, variant), read_config(folder)
    return config, {name: value for file in files for name, value in find_model(file).items()}


def read_config(folder: Path) -> dict:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no config.json{_suggest_inside(folder)}")
    return read_object(folder / "config.json")


def download(repo: str, subfolder: str = "", variant: str = "") -> Path:
    """Download the model of a Hugging Face Hub repository, once, and return the repository's folder.

    Of a pipeline of diffusers it is the transformer, unless there is a ``subfolder``.

    Raises:
        FileNotFoundError: there is no such repository or file, or neither a network nor an earlier download.
    """
    dot, unreachable = f".{variant}" if variant else "", why_no_hub()
    steps = [[pattern for name in WEIGHTS if name.endswith(end) for pattern in _patterns(name, dot)] for end in KINDS]
    steps += [] if variant else [[pattern for name in WEIGHTS for pattern in _patterns(name, ".*")]]
    for patterns in steps:  # stop at the first kind of weights found
        names = (str(PurePosixPath(subfolder, name)) for name in ("config.json", *patterns))
        folder = _snapshot(repo, [*names, *([] if subfolder else [INDEX])], unreachable)
        if not subfolder and (inside := model_folder(folder)) != folder:
            return download(repo, inside.name, variant)
        if any(list_weights(folder / subfolder).values()):
            break
    return folder


def download_config(repo: str, subfolder: str = "") -> Path:
    """Like `download`, without the weights."""
    return _snapshot(repo, [str(PurePosixPath(subfolder, "config.json"))], why_no_hub())


def _snapshot(repo, patterns, unreachable):
    """The folder of a repository's files with names like these; without a network, if it has been downloaded."""
    hub = import_optional("huggingface_hub")
    try:
        return Path(hub.snapshot_download(repo, allow_patterns=patterns, local_files_only=unreachable is not None))
    except (OSError, ValueError) as error:  # the bases of the hub's errors: network, no such repository, bad name
        why = f"and could not be read from the Hugging Face Hub: {one_line(error)}"
        if unreachable is not None:
            cache = import_optional("huggingface_hub.constants").HF_HUB_CACHE
            why = f"nor in {cache}, and {unreachable}; run hf download {repo} where there is a network"
        raise FileNotFoundError(f"{repo!r} is not a local file or folder, {why}") from error


def is_hub_name(source: str | os.PathLike) -> bool:
    """Whether a source that does not exist here may be a Hub repository, "owner/name", and not a mistyped path."""
    name = str(source)
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or name.endswith(ENDINGS):
        return False
    return not Path(name).parent.exists() and not near_path(Path(name))


KINDS = (".safetensors", ".bin")


def _patterns(name, dot):
    """The possible names of weights, whole or in parts, in a variant ``dot`` (".fp16", or "" for none)."""
    stem, kind = name.rsplit(".", 1)
    return [
        f"{stem}{dot}.{kind}",
        f"{name}.index{dot}.json",
        f"{stem}{dot}-*-of-*.{kind}",
        f"{stem}-*-of-*{dot}.{kind}",
    ]


def list_weights(folder: Path) -> dict[str, list[str]]:
    """Map each variant ("" for none) to a folder's weights files or indices, preferred first."""
    found: dict[str, list[str]] = {}
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else ()
    for whole in WEIGHTS:
        stem, kind = whole.rsplit(".", 1)
        one, index = rf"{stem}(?:\.([\w-]+))?\.{kind}", rf"{re.escape(whole)}\.index(?:\.([\w-]+))?\.json"
        for pattern in (one, index):
            for match in filter(None, (re.fullmatch(pattern, name) for name in names)):
                if not re.search(r"-\d+-of-\d+", match[0]):
                    found.setdefault(match[1] or "", []).append(match[0])
    return found


def _find_weights(folder, variant):
    """The files of the state dict."""
    found = list_weights(folder)
    if not variant and "" not in found and len(found) > 1:
        raise ValueError(f"{str(folder)!r} holds several variants: variant must be one of {', '.join(sorted(found))}")
    if not variant and "" not in found and found:
        variant = min(found)
    if variant not in found:
        of = f" of variant {variant!r}" if variant else ""
        raise FileNotFoundError(f"{str(folder)!r} holds no {' or '.join(WEIGHTS)}{of}{_suggest_inside(folder)}")
    chosen = folder / found[variant][0]
    return [chosen] if chosen.suffix != ".json" else _parts(chosen)


def _suggest_inside(folder):
    """The end of an error about a folder without a model: the model inside it, or how to export one."""
    inside = [path.parent for path in sorted(folder.glob("*/config.json"))]
    if len(inside) == 1:
        return f"; did you mean {str(inside[0])!r}?"
    if (folder / "checkpoint.json").is_file() or (folder / "checkpoints").is_dir():
        return f"; it belongs to a training run: python -m ditfast.export {folder} MODEL exports a model"
    return ""


def _parts(index):
    """The weights files that an index lists."""
    names = read_object(index).get("weight_map")
    if not isinstance(names, dict) or not names or any(Path(str(name)).name != name for name in names.values()):
        raise ValueError(f"{index} must have a weight_map of names of files beside it")
    parts = [index.parent / name for name in dict.fromkeys(names.values())]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise FileNotFoundError(
            f"{index} lists {missing[0]}, which is not there ({len(missing)} of {len(parts)} are not)"
        )
    return parts
