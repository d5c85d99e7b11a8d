"""The file of a study: one JSON line with what all runs share, then one per finished run."""

import json
import os
import platform
import sys
from pathlib import Path

import torch


class Records:
    """Complete lines only: a line cut off by an interruption is removed before anything is appended."""

    def __init__(self, path):
        self.path = Path(path)
        self.setup, self.runs = None, []
        if self.path.exists():
            whole = self.path.read_bytes().rpartition(b"\n")[0]
            self.setup, *self.runs = map(json.loads, whole.splitlines()) if whole else (None,)

    def begin(self, setup: dict) -> None:
        """Resume the same study or start one; exits if the file belongs to another."""
        setup = json.loads(json.dumps(setup))  # tuples as lists, as in the file
        if self.setup is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(b"")
            self.setup = self._append(setup)
        elif differing := [name for name in setup if setup[name] != self.setup.get(name) and name != "command"]:
            sys.exit(
                f"{self.path} holds a study with other {', '.join(differing)}: choose another --out, or remove it"
            )
        else:  # drop a line cut off by an interruption
            size = len(self.path.read_bytes().rpartition(b"\n")[0]) + 1
            os.truncate(self.path, size)

    def add(self, run: dict) -> None:
        self.runs.append(self._append(run))

    def has(self, config: str, seed: int) -> bool:
        return any((run["config"], run["seed"]) == (config, seed) for run in self.runs)

    def runs_of(self, config: str) -> list[dict]:
        """A configuration's runs by seed."""
        return sorted((run for run in self.runs if run["config"] == config), key=lambda run: run["seed"])

    def seconds(self) -> float:
        """The duration of the study: each session until its last finished run."""
        ends = {}
        for run in self.runs:
            ends[run["session"]] = max(ends.get(run["session"], 0), run["elapsed"])
        return sum(ends.values())

    def _append(self, record):
        with open(self.path, "ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return record


def machine() -> dict:
    """The machine and versions behind the numbers."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return {"cpu": cpu, "cores": os.cpu_count(), "torch": torch.__version__, "python": platform.python_version()}
