"""What a run tells: losses gathered on the device, a line of metrics.jsonl and TensorBoard, the bar's figures."""

import json
import resource
import time
import warnings
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
    """metrics.jsonl and TensorBoard, from a step on: what an interrupted run wrote after it is removed."""

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.jsonl"
        if self.path.exists():
            kept = [line for line in self.path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
            with atomic_write(self.path) as part:
                part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        board = import_optional("torch.utils.tensorboard")
        self._board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict) -> None:
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:  # a line less is no reason to end a run
            warnings.warn(f"{self.path} is not written: {error.strerror or error}", stacklevel=2)
        for name, value in values.items():
            if value is not None:
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._board.close()


def _step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # half a line, from when it was killed
        return float("inf")


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
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
