"""What `patch` did, and what it left alone."""

import re
from collections import Counter
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # that is all of a name between dots


@dataclass(frozen=True)
class Report:
    """Printed, it has one line for modules that differ in the numbers of their names alone.

    Attributes:
        patched: name of a module -> its class.
        skipped: name of a module that runs as diffusers' -> why.
    """

    patched: dict[str, str]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.patched)} modules run on ditfast", *_lines(self.patched)]
        return "\n".join([*lines, "left to diffusers", *_lines(self.skipped)])


def _lines(modules: dict[str, str]) -> list[str]:
    """One line for each pattern of names and what is said of them, aligned."""
    counted = Counter((_NUMBER.sub("*", name), said) for name, said in modules.items())
    rows = [(f"{count} x", name, said) for (name, said), count in counted.items()]
    widths = [max((len(row[i]) for row in rows), default=0) for i in (0, 1)]
    return [f"  {count:>{widths[0]}} {name:{widths[1]}}  {said}" for count, name, said in rows]
