"""What every command begins with: its words, and an output that takes any text."""

import os
import re
import sys


def words(arguments: list[str] | None = None) -> list[str]:
    """The words of a command, those of the shell if None, with ~ as the home folder where shells leave it: --out=~/x.

    From now on a character that the terminal does not have is printed as an escape, and ends nothing.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's has not
            stream.reconfigure(errors="backslashreplace")
    return [_expand_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]


def _expand_home(word):
    option, path = re.fullmatch(r"(--[\w-]+=)?(.*)", word, re.DOTALL).groups(default="")
    return option + os.path.expanduser(path)
