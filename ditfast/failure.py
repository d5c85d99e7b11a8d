"""Errors that a command does not expect."""

import re
import sys
import traceback

LINE = 300  # characters: a compiler's command line has thousands
FIRST, LAST = 100, 40  # lines of a traceback: a compiler's output has thousands


def in_brief(error: BaseException) -> str:
    """An error in one line: its type, its first line and, where a compiler failed, the first of that one's errors."""
    first, *rest = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    found = [line for line in rest if re.search(r"\berror:", line)]
    return _cut(": ".join(filter(None, [type(error).__name__, first, *found[:1]])))


def explain(error: BaseException) -> str:
    """Print an error's traceback, and return the line to end with."""
    lines = [_cut(line) for line in "".join(traceback.format_exception(error)).splitlines()]
    if (more := len(lines) - FIRST - LAST) > 0:
        lines[FIRST:-LAST] = [f"… {more} lines …"]
    print("\n".join(lines), file=sys.stderr)
    return f"error: {in_brief(error)}"


def _cut(line):
    return line if len(line) <= LINE else f"{line[: LINE - 1]}…"
