"""Paths in options, before anything is done with them."""

import os


def check_paths(parser, o, *options: str) -> None:
    """End a command, as its argparse parser does, if one of these options is a path that the system does not take."""
    for option in options:
        value = getattr(o, option.strip("-").replace("-", "_"))
        if value is not None and (reason := why_unusable(value)):
            parser.error(f"{option} {reason}")


def why_unusable(path) -> str | None:
    """Why there can be no such path, as where a name in it is too long; None if there can."""
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
