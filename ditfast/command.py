"""Shared start of every command: its arguments, and output streams that accept any character."""

import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NoReturn

from ditfast.suggest import did_you_mean


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, and which names a mistyped option before a missing one."""

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Namespace:  # type: ignore[override]
        for word in takewhile(lambda word: word != "--", args):
            if word.startswith("--") and not self.knows(word):
                self.error(unknown([word], self.names()))
        return super().parse_args(args, namespace)

    def names(self) -> list[str]:
        """All options, such as --steps."""
        return [*self._option_string_actions]

    def knows(self, word: str) -> bool:
        """Whether this word, --name or --name=value, is an option or the start of one."""
        return any(name.startswith(word.split("=")[0]) for name in self.names())

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def unknown(words: list[str], names: list[str]) -> str:
    """The error about words that are none of the options ``names``; it suggests one for the first."""
    hint = did_you_mean(words[0].split("=")[0], names, cutoff=0.7)
    return f"unrecognized arguments: {' '.join(words)}{hint}"


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
