"""Results as JSON files, which are never half-written."""

import json
from pathlib import Path

from ditfast.atomic import atomic_write


def write(path: Path | None, result: dict) -> None:
    """Replace the file as a whole; nothing without a path."""
    if path is None:
        return
    with atomic_write(path, concurrent=True) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
