"""Shared start of every command: its arguments, and output streams that accept any character."""

import os
import re
import sys
import textwrap
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, NoReturn

from ditfast.suggest import did_you_mean


class _Help(RawDescriptionHelpFormatter):
    """Keeps the lines of the description, and names such as one-step whole."""

    def _split_lines(self, text, width):
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, and which names a mistyped option before a missing one."""

    def __init__(self, **options: Any):
        super().__init__(**{"formatter_class": _Help, **options})

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


def option_of(name: str) -> str:
    """The option of an argument: --image-size for image_size."""
    return f"--{name.replace('_', '-')}"


def in_options(error: object, *names: str, **renamed: str) -> str:
    """The text of an error; if it begins with one of these arguments, in terms of the option of that name.

    Args:
        renamed: argument -> the option's name, where that is another: ``name="sampler"``.
    """
    options = {**dict(zip(names, names, strict=True)), **renamed}
    name, rest = re.fullmatch(r"(\w*)(.*)", str(error), re.DOTALL).groups()  # type: ignore[union-attr]  # always matches
    return option_of(options[name]) + rest if name in options else str(error)


@contextmanager
def by_option(caught: type[Exception], raised: type[Exception], *names: str, **renamed: str) -> Iterator[None]:
    """Context that raises an error ``caught`` again as ``raised``, with the text of `in_options`."""
    try:
        yield
    except caught as error:
        raise raised(in_options(error, *names, **renamed)) from error


def words(arguments: list[str] | None = None) -> list[str]:
    """Command-line arguments (``sys.argv`` if None), with ~ expanded where the shell does not: --out=~/x.

    Side effect: stdout and stderr print characters they cannot encode as escapes instead of raising, and each line at
    once: in a log, the two are in order.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # missing in notebooks
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    return [_expand_home(word) for word in (sys.argv[1:] if arguments is None else arguments)]


def _expand_home(word):
    option, path = re.fullmatch(r"(--[\w-]+=)?(.*)", word, re.DOTALL).groups(default="")  # always matches
    return option + os.path.expanduser(path)
