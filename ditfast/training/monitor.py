"""What a run tells: losses gathered on the device, a line of metrics.jsonl and TensorBoard, the bar's figures."""

import errno
import json
import os
import resource
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch

from ditfast.atomic import atomic_write
from ditfast.optional import import_optional
from ditfast.ranks import Ranks


class Meter:
    """Losses and norms of the steps since they were last read. Adding never waits for the device; reading does."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._losses, self._norms, self._samples, self.unreadable = [], [], [], 0

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, loss: torch.Tensor, norm: torch.Tensor, batch) -> None:
        """A step's mean loss on this rank and the gradient's norm, () each, and what it was made of."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._samples.append(batch.indices.tolist())
        self.unreadable += len(batch.skipped)

    def read(self) -> dict:
        """``loss`` and ``grad_norm`` of the finite steps in the mean, ``bad``: numbers of the other steps, from 0."""
        losses = self.ranks.sum(torch.stack(self._losses)) / self.ranks.world
        losses, norms = torch.stack([losses, torch.stack(self._norms)]).tolist()
        finite = [i for i, norm in enumerate(norms) if norm < float("inf")]  # false for nan too
        means = {"loss": None, "grad_norm": None}
        if finite:
            means = {k: sum(v[i] for i in finite) / len(finite) for k, v in zip(means, (losses, norms), strict=True)}
        return {**means, "bad": sorted(set(range(len(norms))) - set(finite))}

    def samples(self, step: int) -> list[int]:
        """The samples of a step, of all ranks in order, by index."""
        return [i for part in self.ranks.gather(self._samples[step]) for i in part]

    def clear(self) -> None:
        self.__init__(self.ranks)


class Log:
    """metrics.jsonl and TensorBoard, from a step on: lines of later ones, and those that are damaged, are removed."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_bytes().split(b"\n") if _step(line) <= step]
            with atomic_write(self.path) as part:
                part.write_bytes(b"".join(line + b"\n" for line in kept))
        self._board = Board(folder / "tensorboard", step)

    def write(self, step: int, values: dict) -> None:
        append_line(self.path, {"step": step, **values})
        self._board.write(step, values)

    def close(self) -> None:
        self._board.close()


class Board:
    """TensorBoard's files, until one cannot be written: its writer does not recover."""

    def __init__(self, folder: Path, step: int):
        self._folder, self._writer = folder, None
        make = import_optional("torch.utils.tensorboard").SummaryWriter
        with self._ending_in_a_warning():
            self._writer = make(str(folder), purge_step=step + 1)

    def write(self, step: int, values: dict) -> None:
        with self._ending_in_a_warning():
            for name, value in values.items():
                if value is not None and self._writer:
                    self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        with self._ending_in_a_warning():
            if self._writer:
                self._writer.close()

    @contextmanager
    def _ending_in_a_warning(self):
        try:
            yield
        except Exception as error:  # what its thread met, of any kind, comes with a later call
            self._writer = None
            warnings.warn(f"{self._folder} is not written any more: {_reason(error)}", stacklevel=4)


def append_line(path: Path, content: dict) -> None:
    """Add a line of JSON to a file, whole or not at all; a line less is no reason to end a run."""
    line = (json.dumps(content) + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as file:
            start = file.tell()
            if file.write(line) < len(line):  # the disk filled up on the way
                file.truncate(start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        warnings.warn(f"{path} is not written: {_reason(error)}", stacklevel=3)


def _reason(error):
    return getattr(error, "strerror", None) or error


def _step(line):
    """The step of a line; past all of them if it cannot be read, as half a line from when it was killed."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return step if type(step) is int else float("inf")


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix multiplication here: what the share of model FLOPs is a share of."""
    size, times = (512, 3) if device == "cpu" else (8192, 10)
    a = torch.randn(size, size, device=device).to(dtype)
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    a @ a
    wait()
    start = time.perf_counter()
    for _ in range(times):
        a @ a
    wait()
    return 2 * size**3 * times / (time.perf_counter() - start)


def memory_gib(device: str) -> float:
    """The most that this process has had at once: on its GPU, or of the host's memory without one."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, others KiB
