"""Whether a kernel is correct on this machine, checked before the automatic choice takes it.

On first use of (operation, backend, dtypes, width) the kernel runs forward and backward on a small random problem,
defined by the operation (``_self_check`` at the end of its file), and is held to the numerical contract. The verdict
is kept in memory and on disk (`ditfast.ops.backends.cache`). If there is none, because memory ran out or compilation
failed, the kernel is not used and the next process tries again. In a job all ranks use one answer
(`ditfast.ops.backends.agreement`). ``DITFAST_SELFCHECK=0`` trusts every kernel.
"""

import os
import threading
import time
import warnings
from dataclasses import dataclass

import torch

from ditfast.ops import contract
from ditfast.ops.backends import cache
from ditfast.ops.backends.agreement import agreed
from ditfast.ops.backends.apart import run_apart
from ditfast.ops.op import Op, RandomTensors

SIZE = (2, 1100)  # samples, tokens: enough for one program to process several tokens

_answers: dict[tuple, bool] = {}
_lock = threading.RLock()


@dataclass(frozen=True)
class Result:
    """The result of one self-check.

    Attributes:
        op, backend, stream, branch, width: the kernel, its dtypes, and the width that it was checked at.
        reason: why it may not be used; None if it meets the contract.
        seconds: duration of the check.
        was_compared: False if the check raised instead of comparing.
    """

    op: str
    backend: str
    stream: torch.dtype
    branch: torch.dtype
    width: int
    reason: str | None
    seconds: float
    was_compared: bool = True


def is_right(
    op: Op, backend: str, stream: torch.dtype, branch: torch.dtype, width: int, device: torch.device
) -> bool:
    """Whether the automatic choice may take a kernel; decided once per process."""
    answer = _answers.get((op.name, backend, stream, branch, width, device))
    return _decide(op, backend, stream, branch, width, device=device) if answer is None else answer


def label(op: Op, backend: str, stream: torch.dtype, branch: torch.dtype, width: int) -> str:
    """Key of an answer on disk and in messages."""
    return f"{op.name}/{backend} {stream} {branch} {width}".replace("torch.", "")


def remember(op: Op, result: Result, device: torch.device) -> None:
    """Store an answer in memory and, if numbers were compared, on disk."""
    kernel = result.backend, result.stream, result.branch, result.width
    if result.was_compared:
        cache.store(device, label(op, *kernel), result.reason is None)
    key = op.name, *kernel, device
    _answers[key] = result.reason is None


def _decide(op, *kernel, device) -> bool:
    if os.environ.get("DITFAST_SELFCHECK") == "0":
        return True
    key, name = (op.name, *kernel, device), label(op, *kernel)
    with _lock:
        if key not in _answers:
            if is_capturing(device) and cache.load(device).get(name) is None:
                warn_of_capture(name, "call ditfast.verify()")
                return False  # no check can run now; the next call outside the capture runs it
            _answers[key] = agreed(
                name,
                lambda: _answer(op, *kernel, device=device),
                is_known=lambda: isinstance(cache.load(device).get(name), bool),
            )
        return _answers[key]


def _answer(op, *kernel, device) -> bool:
    """From disk, else by a check; warns if the kernel may not be used."""
    name = label(op, *kernel)
    answer = cache.load(device).get(name)
    if isinstance(answer, bool):
        if not answer:
            _warn(name, device, "failed its self-check")
        return answer
    result = check(op, *kernel, device)  # type: ignore[call-arg]  # kernel is four values
    remember(op, result, device)
    if result.reason is None:
        return True
    _warn(name, device, "failed its self-check" if result.was_compared else f"could not be checked ({result.reason})")
    return False


def _warn(name, device, what):
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    warnings.warn(
        f"ditfast: the kernel {name} {what} on {where} and is not used: see `python -m ditfast.doctor --verify`",
        RuntimeWarning,
        stacklevel=2,
    )


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def warn_of_capture(name: str, remedy: str) -> None:
    """Warn that a choice cannot be made while a CUDA graph is captured."""
    warnings.warn(
        f"ditfast: {name} is not decided yet and cannot be during CUDA graph capture: the graph will use PyTorch's "
        f"own operation. To avoid this, {remedy} or run the model once before capturing",
        RuntimeWarning,
        stacklevel=2,
    )


def check(op: Op, backend: str, stream: torch.dtype, branch: torch.dtype, width: int, device: torch.device) -> Result:
    """Run a kernel and compare; one that raises may not be used. Leaves global random state alone."""
    start, was_compared = time.perf_counter(), True
    try:
        reason = run_apart(device, _compare, op, backend, (stream, branch), width, device)
    except Exception as error:  # failed to compile or launch, or ran out of memory
        reason, was_compared = f"{type(error).__name__}: {str(error)[:300]}", False
    return Result(op.name, backend, stream, branch, width, reason, time.perf_counter() - start, was_compared)


@torch.no_grad()
def _compare(op, backend, precision, width, device):
    """Why the kernel's outputs or gradients break the contract; None if they meet it."""

    def run(backend, dtype=None):
        return op.self_check(RandomTensors(precision, device, dtype, SIZE), width, backend)

    got, low, ref = run(backend), run("reference"), run("reference", torch.float64)
    sums = [f"d{name}" for name in op.parameters]
    for name in got:
        # a remark may follow the name, as in "dw1 (recomputed)"
        reason = contract.violation(got[name], low[name], ref[name], per_sample=name.split()[0] not in sums)
        if reason is not None:
            return f"{name}: {reason}"
    return None
