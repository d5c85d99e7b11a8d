"""Metrics of a run: losses collected on the device, metrics.jsonl, TensorBoard, throughput and memory figures."""

import errno
import json
import os
import resource
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ditfast.atomic import atomic_write
from ditfast.data.stream import Batch
from ditfast.optional import import_optional
from ditfast.ranks import Ranks


class Meter:
    """Losses and gradient norms of recent steps. Adding never waits for the device; reading does."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self.clear()

    def __len__(self) -> int:
        return len(self._losses)

    def add(self, loss: torch.Tensor, norm: torch.Tensor, batch: Batch) -> None:
        """Add a step: its mean loss on this rank, its gradient norm, () each, and its batch."""
        self._losses.append(loss)
        self._norms.append(norm)
        self._samples.append(batch.indices.tolist())
        self.unreadable += len(batch.skipped)

    def read(self) -> dict[str, Any]:
        """Mean ``loss`` and ``grad_norm`` over the finite steps, and ``bad``: indices of the others, from 0."""
        summed = self.ranks.sum(torch.stack(self._losses)) / self.ranks.world
        losses, norms = torch.stack([summed, torch.stack(self._norms)]).tolist()
        finite = [i for i, norm in enumerate(norms) if norm < float("inf")]  # also false for NaN
        means: dict[str, float | None] = {"loss": None, "grad_norm": None}
        if finite:
            means = {k: sum(v[i] for i in finite) / len(finite) for k, v in zip(means, (losses, norms), strict=True)}
        return {**means, "bad": sorted(set(range(len(norms))) - set(finite))}

    def samples(self, step: int) -> list[int]:
        """Indices of the samples in a step, over all ranks in order."""
        return [i for part in self.ranks.gather(self._samples[step]) for i in part]

    def clear(self) -> None:
        """Forget all steps."""
        self._losses: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._samples: list[list[int]] = []
        self.unreadable = 0


class Log:
    """metrics.jsonl and TensorBoard, continued after ``step``: later and damaged lines are removed."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_bytes().split(b"\n") if _step(line) <= step]
            with atomic_write(self.path) as part:
                part.write_bytes(b"".join(line + b"\n" for line in kept))
        self._board = Board(folder / "tensorboard", step)

    def write(self, step: int, values: dict[str, Any]) -> None:
        append_line(self.path, {"step": step, **values})
        self._board.write(step, values)

    def close(self) -> None:
        self._board.close()


class Board:
    """TensorBoard files. Stops at the first write error, from which TensorBoard's writer does not recover."""

    def __init__(self, folder: Path, step: int):
        self._folder = folder
        self._writer: Any = None
        make = import_optional("torch.utils.tensorboard").SummaryWriter
        with self._ending_in_a_warning():
            self._writer = make(str(folder), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
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
        except Exception as error:  # its thread's errors, of any type, surface in a later call
            self._writer = None
            warnings.warn(f"no longer writing {self._folder}: {_reason(error)}", stacklevel=4)


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append a line of JSON to a file, completely or not at all; a failure is only a warning."""
    line = (json.dumps(content) + "\n").encode()
    try:
        with open(path, "ab", buffering=0) as file:
            start = file.tell()
            if file.write(line) < len(line):  # the disk filled up
                file.truncate(start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        warnings.warn(f"cannot write {path}: {_reason(error)}", stacklevel=3)


def _reason(error):
    return getattr(error, "strerror", None) or error


def _step(line):
    """The step of a line; infinity if it cannot be parsed, such as one cut short by a kill."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return step if type(step) is int else float("inf")


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix multiplication on the device, the fastest of five: the denominator of MFU."""
    size, times = (512, 3) if device == "cpu" else (8192, 10)
    a = torch.randn(size, size, device=device).to(dtype)
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    a @ a
    wait()
    rounds = []
    for _ in range(5):  # other processes slow some of them down
        start = time.perf_counter()
        for _ in range(times):
            a @ a
        wait()
        rounds.append(time.perf_counter() - start)
    return 2 * size**3 * times / min(rounds)


def memory_gib(device: str) -> float:
    """Peak memory of this process in GiB: on its GPU, or without one, on the host."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, others KiB
