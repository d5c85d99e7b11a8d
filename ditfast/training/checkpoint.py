"""Checkpoints of a run: atomic, verified before they are read, and independent of the number of ranks."""

import os
import re
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ditfast.atomic import part_path
from ditfast.counted import counted
from ditfast.ranks import Ranks
from ditfast.training import TrainError
from ditfast.training.manifest import ABOUT, checksum, find_fault, read_about, write_about
from ditfast.training.tensor_index import Reader

FOLDER, CONFIG = "checkpoints", "config.yaml"  # inside a run's folder
FAILURES = (Exception, CheckpointException)  # DCP wraps system errors in a BaseException


class Checkpoints:
    """The checkpoints in a folder, named step-00001000 and so on; the newest ``keep`` are kept.

    torch.distributed.checkpoint writes the tensors, each rank its shard, into a temporary folder that is renamed once
    everything is on disk. checkpoint.json next to them holds the rest of the run's state and all checksums.
    """

    def __init__(self, folder: str | Path, keep: int, ranks: Ranks):
        self.folder, self.keep, self.ranks = Path(folder), keep, ranks

    def save(self, step: int, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> Path:
        """Write a checkpoint and delete the oldest.

        Raises:
            TrainError: on every rank, if writing failed on any; older checkpoints are kept.
        """
        target = self.folder / step_name(step)
        part = part_path(target)
        try:
            self._on_first(target, lambda: _make_empty(part))
            self._on_all(target, lambda: _write(tensors, part))
            sums = self._on_all(target, lambda: _checksums(part, rf"__{self.ranks.rank}_.*|\.metadata"))
            files = {name: found for each in self.ranks.gather(sums) for name, found in each.items()}
            self._on_first(target, lambda: _finish(part, target, {**about, "step": step, "files": files}))
        finally:
            if self.ranks.is_first:
                shutil.rmtree(part, ignore_errors=True)  # left over if writing failed
        if self.ranks.is_first:
            for old in self.finished()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        return target

    def finished(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        found = self.folder.glob("step-*") if self.folder.is_dir() else ()
        return sorted(path for path in found if re.fullmatch(r"step-\d{8,}", path.name))

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints of later steps, from which the resumed run will diverge."""
        for path in self.finished() if self.ranks.is_first else ():
            if int(path.name.removeprefix("step-")) > step:
                path.rename(path.with_name(f"left-{path.name}-{time.time_ns()}"))

    def newest_whole(self) -> Path | None:
        """The newest intact checkpoint; warns about each damaged one.

        Raises:
            TrainError: there are checkpoints, but none is intact.
        """
        found = self.finished()
        for path in reversed(found):
            fault = self._find_fault(path)
            if fault is None:
                return path
            if self.ranks.is_first:
                warnings.warn(f"skipping {path}: {fault}", stacklevel=2)
        if found:
            raise TrainError(f"none of {counted(len(found), 'checkpoint')} in {self.folder} is intact")
        return None

    def read_about(self, path: Path) -> dict[str, Any]:
        """Contents of checkpoint.json.

        Raises:
            TrainError: the path is not an intact checkpoint.
        """
        if fault := self._find_fault(path):
            raise TrainError(f"{path} cannot be read: {fault}")
        return self.ranks.gather(read_about(path) if self.ranks.is_first else None)[0]

    def read_tensors(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        """Read an intact checkpoint into ``tensors``, in place.

        Raises:
            TrainError: it holds different tensors.
        """
        try:
            _quietly(dcp.load, tensors, storage_reader=Reader(path))
        except FAILURES as error:
            raise TrainError(f"{path} cannot be read: {_short(error)}") from error

    def _find_fault(self, path):
        """What is wrong with a checkpoint, if anything; rank 0 checks and tells the others."""
        return self.ranks.gather(find_fault(path) if self.ranks.is_first else None)[0]

    def _on_first(self, target, work):
        self._on_all(target, work if self.ranks.is_first else lambda: None)

    def _on_all(self, target, work):
        """Do the work; a failure on one rank is a failure on all."""
        error = result = None
        try:
            result = work()
        except FAILURES as found:
            error = found
        reasons = [reason for reason in self.ranks.gather(error and _short(error)) if reason]
        if reasons:
            raise TrainError(f"cannot write {target}: {reasons[0]}") from error
        return result


def checkpoint_at(path: Path) -> Path | None:
    """The checkpoint at ``path``, or the newest intact one if it is a run's folder or its checkpoints folder."""
    if (path / ABOUT).is_file():
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    return Checkpoints(folder, 1, Ranks()).newest_whole()


def is_run(path: Path) -> bool:
    """Whether ``path`` is a run's folder, with or without checkpoints."""
    return (path / CONFIG).is_file()


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def _write(tensors, part):
    _quietly(dcp.save, tensors, checkpoint_id=part)


def _quietly(call, tensors, **where):
    """Call DCP without its warnings about single processes and its own use of deprecated functions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(tensors, **where)


def _make_empty(part):
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)


def _finish(part, target, content):
    if gone := [name for name in content["files"] if not (part / name).is_file()]:
        raise OSError(f"rank 0 cannot see {gone[0]}: all ranks must share the output folder")
    write_about(part, content)
    shutil.rmtree(target, ignore_errors=True)  # from a run that diverged
    os.replace(part, target)


def _checksums(folder, pattern):
    names = [path.name for path in folder.iterdir() if re.fullmatch(pattern, path.name)]
    return {name: checksum(folder / name) for name in sorted(names)}


def _short(error):
    """The system error inside DCP's report from all ranks, or the report's last line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    cause = re.search(r"No space left on device|Permission denied|Read-only file system|quota exceeded", str(error))
    return cause[0] if cause else lines[-1]
