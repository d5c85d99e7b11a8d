"""Early checks of paths given as options."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path


def check_paths(parser: ArgumentParser, o: Namespace, *options: str) -> None:
    """Exit through ``parser.error`` if one of these options is not a valid path on this system."""
    for option in options:
        value = getattr(o, option.strip("-").replace("-", "_"))
        if value is not None and (reason := why_unusable(value)):
            parser.error(f"{option} {reason}")


def why_unusable(path: str | Path) -> str | None:
    """Why such a path cannot exist, for example because a name in it is too long; None if it can."""
    text = str(path)
    if not text:
        return "must be a path, got ''"
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a null character
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        return f"cannot be {shown}: {getattr(error, 'strerror', error)}"
    return None
