"""How far a command has come, on stderr."""

import sys
from typing import Any

from ditfast.optional import import_optional

EVERY = 60.0  # seconds between the lines of a log


def progress(total: int, unit: str, label: str | None = None, hidden: bool = False) -> Any:
    """A tqdm bar on a terminal; elsewhere, as in a log, lines: one at the start, one a minute, one at the end."""
    options: dict[str, Any] = {"total": total, "unit": unit, "desc": label, "disable": hidden}
    if not sys.stderr.isatty():
        options |= {"file": _Lines(), "mininterval": EVERY, "maxinterval": EVERY}
        options["bar_format"] = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}]"
    return import_optional("tqdm").tqdm(**options)


class _Lines:
    """A file for tqdm that writes each state of the bar on a line of its own."""

    def write(self, text: str) -> None:
        if text := text.strip():
            sys.stderr.write(f"{text}\n")

    def flush(self) -> None:
        sys.stderr.flush()
