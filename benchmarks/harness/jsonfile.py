"""Results as JSON files that are never half-written."""

import json
from pathlib import Path

from ditfast.atomic import atomic_write


def write(path: Path | None, result: dict) -> None:
    """Replace the file atomically; does nothing if the path is None."""
    if path is None:
        return
    with atomic_write(path, concurrent=True) as part:
        part.write_text(json.dumps(result, indent=1) + "\n")
