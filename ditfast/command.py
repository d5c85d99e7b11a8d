"""Shared start of every command: its arguments, and output streams that accept any character."""

import os
import re
import sys


def words(arguments: list[str] | None = None) -> list[str]:
    """Command-line arguments (``sys.argv`` if None), with ~ expanded where the shell does not: --out=~/x.

    Side effect: stdout and stderr print characters they cannot encode as escapes instead of raising.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # missing in notebooks
            stream.reconfigure(errors="backslashreplace")
    return [_expand_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]


def _expand_home(word):
    option, path = re.fullmatch(r"(--[\w-]+=)?(.*)", word, re.DOTALL).groups(default="")  # always matches
    return option + os.path.expanduser(path)
