"""Comparison with an earlier measurement."""

import json
from pathlib import Path

from harness import report
from harness.report import ms_text
from harness.verdicts import is_ours

SCHEMA = 1


class Incomparable(ValueError):
    """Two measurements are of different machines or workloads."""


def load(path: Path) -> dict:
    """Read a file written by ``--json``.

    Raises:
        ValueError: the file is missing, is not JSON, or has another schema.
    """
    if not path.is_file():
        raise ValueError(f"must be a file written by --json, got {str(path)!r}, which does not exist")
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"must be a file written by --json, but {str(path)!r} is not valid JSON") from error
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise ValueError(f"must be a file written by --json with schema {SCHEMA}, got {str(path)!r}")
    return result


def require_same(old: dict, machine: dict, workload: dict) -> None:
    """Raise `Incomparable` unless the earlier measurement is of the same machine and workload."""
    for what, then, now in (
        ("machine", old["header"]["machine"], machine),
        ("workload", old["workload"], workload),
    ):
        changed = [k for k in then.keys() | now.keys() if then.get(k) != now.get(k)]
        if changed:
            shown = "; ".join(f"{k} was {then.get(k)}, is {now.get(k)}" for k in sorted(changed))
            raise Incomparable(f"the {what} differs: {shown}")


def ratios(old: dict, new: dict) -> list[dict]:
    """For each case in both measurements: both times, and old / new, which is above 1 if it became faster."""
    before = {(c["variant"], c["mode"]): c["ms"]["median"] for c in old["cases"] if c["ms"]}
    found = []
    for case in new["cases"]:
        key = (case["variant"], case["mode"])
        if case["ms"] and key in before:
            then, now = before[key], case["ms"]["median"]
            found.append({"variant": key[0], "mode": key[1], "old_ms": then, "new_ms": now, "ratio": then / now})
    return found


def show_ratios(found: list[dict], fail_below: float | None) -> bool:
    """Print old / new time for each case. Return whether both have cases of ditfast, and none is below the limit."""
    ours = [r for r in found if is_ours(r["variant"])]
    slower = [r for r in ours if fail_below is not None and r["ratio"] < fail_below]
    rows = []
    for r in found:
        cells = {"variant": r["variant"], "mode": r["mode"], "old / new": f"{r['ratio']:.3f}"}
        cells |= {"old ms": ms_text(r["old_ms"]), "new ms": ms_text(r["new_ms"])}
        rows.append((cells, "red" if r in slower else None))
    columns = ("variant", "mode", "old ms", "new ms", "old / new")
    out = report.console()
    out.print(report.table("against the earlier measurement", columns, rows, ("variant", "mode")))
    if slower:
        out.print(f"{len(slower)} of {len(ours)} cases of ditfast below {fail_below}", style="red")
    if fail_below is not None and not ours:
        out.print("no case of ditfast is in both measurements", style="red")
    return not slower and (fail_below is None or bool(ours))
