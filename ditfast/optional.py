"""Packages that only some commands need: the extra ``train``."""

from importlib import import_module


def import_optional(module: str):
    """The module.

    Raises:
        ImportError: it is not installed; the text says how to get it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed: pip install 'ditfast[train]'") from error
