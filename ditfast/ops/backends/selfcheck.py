"""Whether kernels are right on this machine, asked before the automatic choice takes one.

On first use of (operation, backend, dtypes, width) the kernel runs forward and backward on a small made-up problem
and is held to the numerical contract. The answer is kept in memory and on disk (`ditfast.ops.backends.cache`).
``DITFAST_SELFCHECK=0`` trusts every kernel.
"""

import contextlib
import os
import threading
import time
import warnings
from dataclasses import dataclass

import torch

from ditfast.ops import contract
from ditfast.ops.backends import cache, log
from ditfast.ops.op import Op, RandomTensors

SIZE = (2, 1100)  # samples and tokens: enough that a program walks over several tokens

_answers: dict[tuple, bool] = {}
_lock = threading.RLock()


@dataclass(frozen=True)
class Result:
    """One answer: ``reason`` is None if the kernel ``backend`` of ``op`` keeps the contract."""

    op: str
    backend: str
    stream: torch.dtype
    branch: torch.dtype
    width: int
    reason: str | None
    seconds: float


def is_right(
    op: Op, backend: str, stream: torch.dtype, branch: torch.dtype, width: int, device: torch.device
) -> bool:
    """Whether the automatic choice may take a kernel; decided once per process."""
    answer = _answers.get((op.name, backend, stream, branch, width, device))
    return _decide(op, backend, stream, branch, width, device=device) if answer is None else answer


def label(op: Op, backend, stream, branch, width) -> str:
    """Name of an answer on disk and in messages."""
    return f"{op.name}/{backend} {stream} {branch} {width}".replace("torch.", "")


def remember(op: Op, backend, stream, branch, width, device, answer: bool) -> None:
    """Keep an answer in memory and on disk."""
    cache.store(device, label(op, backend, stream, branch, width), answer)
    _answers[op.name, backend, stream, branch, width, device] = answer


def _decide(op, *kernel, device) -> bool:
    if os.environ.get("DITFAST_SELFCHECK") == "0":
        return True
    key, name = (op.name, *kernel, device), label(op, *kernel)
    with _lock:
        if key in _answers:
            return _answers[key]
        answer = cache.load(device).get(name)
        if answer is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False  # a check cannot run now; the next call outside of a capture makes it
            answer = check(op, *kernel, device).reason is None
            remember(op, *kernel, device, answer)
        _answers[key] = answer
    if not answer:
        _warn(name, device)
    return answer


def _warn(name, device):
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    warnings.warn(
        f"ditfast: the kernel {name} failed its self-check on {where} and is not used; "
        "`python -m ditfast.doctor --verify` shows why",
        RuntimeWarning,
        stacklevel=2,
    )


def check(op: Op, backend: str, stream: torch.dtype, branch: torch.dtype, width: int, device: torch.device) -> Result:
    """Run a kernel and compare; an exception counts as a failure. Global random state is not touched."""
    start = time.perf_counter()
    try:
        with on_device(device), torch.no_grad(), torch.autocast(device.type, enabled=False), log.pause():
            reason = _compare(op, backend, (stream, branch), width, device)
    except Exception as error:  # a kernel that does not compile or launch is not used
        reason = f"{type(error).__name__}: {str(error)[:300]}"
    return Result(op.name, backend, stream, branch, width, reason, time.perf_counter() - start)


def on_device(device):
    """A context in which kernels are launched on ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _compare(op, backend, precision, width, device):
    """Why the kernel's outputs or gradients break the contract; None if they keep it."""

    def run(backend, dtype=None):
        return op.self_check(RandomTensors(precision, device, dtype, SIZE), width, backend)

    got, low, ref = run(backend), run("reference"), run("reference", torch.float64)
    sums = [f"d{name}" for name in op.parameters]
    for name in got:
        reason = contract.violation(got[name], low[name], ref[name], per_sample=name not in sums)
        if reason is not None:
            return f"{name}: {reason}"
    return None
