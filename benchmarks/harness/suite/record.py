"""The record that gpu_suite.py writes: the newest result of every stage for one commit on one machine."""

import json
from pathlib import Path

from harness.suite.stages import BENCHMARKS, ROOT, STAGES


def new(head: dict, options) -> dict:
    record = {"schema": 1, "benchmark": "gpu_suite", "interpreted": options.interpret, "header": head}
    return record | {"deadline": options.deadline, "stages": [], "checks": []}


def result_path(folder: Path | None, head: dict) -> Path:
    """The file of a record with this header; creates its folder."""
    gpu = head["machine"].get("gpu", "").replace(" ", "-")
    folder = folder or (BENCHMARKS / "results" / gpu if gpu else ROOT / "build" / "gpu_suite")
    folder.mkdir(parents=True, exist_ok=True)
    commit = (head["commit"] or "unknown").replace("+", "-")
    return folder / f"{head['date'][:10]}-{commit}.json"


def load(path: Path) -> dict:
    """Read a record.

    Raises:
        ValueError: the file does not contain a record.
    """
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"must be files written by gpu_suite.py, got {str(path)!r}: {error}") from error
    if not isinstance(record, dict) or record.get("benchmark") != "gpu_suite":
        raise ValueError(f"must be files written by gpu_suite.py, got {str(path)!r}")
    return record


def merge(records: list[dict]) -> dict:
    """Merge records into one with the newest result of every stage and the newest header.

    Raises:
        ValueError: the records are not of one commit on one machine.
    """
    first, *rest = map(_identity, records)
    for other in rest:
        if other != first:
            raise ValueError(f"must be of one commit on one machine, got {first} and {other}")
    newest = {}
    for record in records:
        for stage in record["stages"]:
            known = newest.get(stage["name"])
            if known is None or _rank(stage) >= _rank(known[0]):
                newest[stage["name"]] = stage, [c for c in record["checks"] if c["stage"] == stage["name"]]
    chosen = [newest[name] for name in sorted(newest, key=_position)]
    merged = max(records, key=lambda record: record["header"]["date"])
    return merged | {"stages": [stage for stage, _ in chosen], "checks": [c for _, checks in chosen for c in checks]}


def _identity(record):
    return record["header"]["machine"], record["header"]["commit"], record["interpreted"]


def _rank(stage):
    """A stage without a result does not replace one with a result."""
    return stage["result"] is not None, stage["date"]


def _position(name):
    names = [stage.name for stage in STAGES]
    return names.index(name) if name in names else len(names)
