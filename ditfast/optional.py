"""Packages that only some commands need."""

from importlib import import_module
from typing import Any

_SAMPLE = ("PIL", "diffusers", "huggingface_hub", "tqdm")  # the extra ``sample``; ``train`` adds all the others
_PACKAGES = {"PIL": "Pillow", "sklearn": "scikit-learn", "yaml": "PyYAML"}  # top-level module -> its package


def import_optional(module: str) -> Any:
    """Import a module from one of the extras.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        extra = "sample" if module.split(".")[0] in _SAMPLE else "train"
        package = _PACKAGES.get(module.split(".")[0], module)
        raise ImportError(f"{package} is not installed: pip install 'ditfast[{extra}]'") from error
