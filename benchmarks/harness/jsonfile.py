"""JSON files that are never half-written."""

import json
import os
from pathlib import Path


def write(path: Path | None, result: dict) -> None:
    """Replace the file as a whole; nothing without a path."""
    if path is None:
        return
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
