"""Packages that only some commands need."""

from importlib import import_module

_SAMPLE = ("PIL", "diffusers", "huggingface_hub", "tqdm")  # the extra ``sample``; ``train`` has these and all others


def import_optional(module: str):
    """The module.

    Raises:
        ImportError: it is not installed; the text says how to get it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        extra = "sample" if module.split(".")[0] in _SAMPLE else "train"
        raise ImportError(f"{module} is not installed: pip install 'ditfast[{extra}]'") from error
