"""Shared argument parsing. Every error is one line that names the argument, the rule and the value."""

import argparse
from difflib import get_close_matches
from importlib.util import find_spec


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def one_of(names):
    def check(text):
        if text not in names:
            near = get_close_matches(text, names, n=1, cutoff=0)[0]
            rule = f"must be one of {', '.join(names)}"
            raise argparse.ArgumentTypeError(f"{rule}; got {text!r}, did you mean {near}?")
        return text

    return check


def count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def ratio(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def require_writable(options: argparse.Namespace) -> None:
    """Raise ValueError if ``--json`` or ``--plot`` could not be written at the end."""
    if options.plot and find_spec("matplotlib") is None:
        raise ValueError("argument --plot: needs matplotlib, which is not installed: pip install 'ditfast[bench]'")
    for flag in ("json", "plot"):
        path = getattr(options, flag)
        if path and not path.parent.is_dir():
            raise ValueError(f"argument --{flag}: must be in an existing folder, got {str(path)!r}")
