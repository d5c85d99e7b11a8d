"""What `patch` did, and what it left alone."""

import re
from collections import Counter
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole component of a dotted name


@dataclass(frozen=True)
class Report:
    """The result of `patch`. Printing groups modules whose names only differ in numbers.

    Attributes:
        patched: module name -> its class.
        skipped: name of a module left to diffusers -> why.
    """

    patched: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.patched)} modules run on ditfast", *_lines(self.patched)]
        return "\n".join([*lines, "left to diffusers", *_lines(self.skipped)])


def _lines(modules: dict[str, str]) -> list[str]:
    """One aligned line per name pattern and text."""
    counted = Counter((_NUMBER.sub("*", name), said) for name, said in modules.items())
    rows = [(f"{count} x", name, said) for (name, said), count in counted.items()]
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    return [f"  {count:>{widths[0]}} {name:{widths[1]}}  {said}" for count, name, said in rows]
