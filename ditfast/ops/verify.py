"""Run the self-check ahead of time for the shapes of DiT models and cache the results.

`verify` runs in this process. `verify_in_subprocess` uses a child process, so that a crashing kernel cannot take this
one down: that kernel counts as failed, and a new child continues with the rest. If a child is killed from outside,
nothing is cached for the kernel it was checking.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from ditfast import ops
from ditfast.ops.backends import cache, selfcheck
from ditfast.ops.backends.availability import why_not
from ditfast.ops.backends.selfcheck import Result
from ditfast.ops.op import PRECISIONS

HIDDEN_SIZES = (384, 768, 1024, 1152)  # S, B, L, XL
CRASHES = [-number for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)]  # exit statuses
RESTART = 75  # exit status of a child whose GPU became unusable after a kernel it has reported


def kernels_to_check(
    device_type: str, hidden_sizes: Sequence[int] = HIDDEN_SIZES, precisions: Sequence[str] = tuple(PRECISIONS)
) -> list[tuple]:
    """(op, backend, stream dtype, branch dtype, width) of every kernel that such DiTs may run on this device type."""
    found = []
    for op in ops.ALL:
        if op.self_check is None:
            continue
        widths = dict.fromkeys(width for size in hidden_sizes for width in op.widths(size))
        found += [
            (op, backend, *PRECISIONS[precision], width)
            for backend in op.kernels
            if why_not(op, backend, device_type) is None
            for precision in precisions
            if precision in op.auto_precisions and precision in op.backends[backend]
            for width in widths
        ]
    return found


def verify(
    device: torch.device | str | None = None,
    hidden_sizes: Sequence[int] = HIDDEN_SIZES,
    precisions: Sequence[str] = tuple(PRECISIONS),
    progress: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Check every kernel on this machine now, ignoring the cache, and cache the results.

    Args:
        device: a device or its name; None for the current CUDA device, or the CPU if there is none.
        hidden_sizes: D of each model of interest.
        precisions: any of "bf16", "autocast", "fp16", "fp32".
        progress: called with each result as it arrives.

    Raises:
        ValueError: a precision is unknown.
        RuntimeError: no kernel can run on the device.
    """
    for name in precisions:
        if name not in PRECISIONS:
            raise ValueError(f"precisions must be among {', '.join(PRECISIONS)}, got {name!r}")
    target, results = _device(device), []
    for result in _check_all(_require_any(kernels_to_check(target.type, hidden_sizes, precisions), target), target):
        results.append(result)
        progress(result)
    return results


def verify_in_subprocess(
    hidden_sizes: Sequence[int] = HIDDEN_SIZES, precisions: Sequence[str] = tuple(PRECISIONS)
) -> Iterator[Result]:
    """Like `verify`, but in a child process; yield results as they arrive.

    Raises:
        RuntimeError: no kernel can run on the device, or a child cannot be started.
    """
    device = _device(None)
    pending = _require_any(kernels_to_check(device.type, hidden_sizes, precisions), device)
    while pending:
        start, before = time.perf_counter(), len(pending)
        status = yield from _run_child(pending, device)
        if status in (0, RESTART) and len(pending) == before:
            raise RuntimeError(f"the kernel-checking process exited with status {status} before checking any")
        if status not in (0, RESTART) and pending:
            op, *key = pending.pop(0)
            if status in CRASHES:
                cache.store(device, selfcheck.label(op, *key), False)
            reason, seconds = f"the process died, exit status {status}", time.perf_counter() - start
            yield Result(op.name, *key, reason, seconds, False)  # type: ignore[call-arg]  # key is four values


def _run_child(pending, device):
    """Run a child on everything pending; yield its results and return its exit status."""
    keys = [[op.name, backend, _name(s), _name(b), width] for op, backend, s, b, width in pending]
    command = [sys.executable, "-m", "ditfast.ops.verify"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, **pipes, stderr=errors, text=True) as child,
    ):
        try:
            child.stdin.write(json.dumps([str(device), keys]))
            child.stdin.close()
        except BrokenPipeError:
            pass  # already dead, which the next line detects
        if child.stdout.readline().strip() != "ready":
            child.wait()
            errors.seek(0)
            why = (errors.read().strip() or "no message").splitlines()[-1]
            raise RuntimeError(f"the kernel-checking process did not start: {why}")
        try:
            for line in child.stdout:
                op, *key = pending.pop(0)
                yield Result(op.name, *key, *json.loads(line))
        finally:
            if child.poll() is None and pending:
                child.kill()
    return child.wait()


def _check_all(pending, device):
    for key in pending:
        result = selfcheck.check(*key, device)
        selfcheck.remember(key[0], result, device)
        yield result


def _device(device):
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _require_any(found, device):
    if not found:
        reasons = dict.fromkeys(why_not(op, name, device.type) for op in ops.ALL for name in op.kernels)
        why = "; ".join(filter(None, reasons)) or "the automatic choice takes no kernel in these precisions"
        raise RuntimeError(f"nothing to verify here: {why}")
    return found


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def main() -> None:
    device, pending = json.load(sys.stdin)
    device, known = torch.device(device), {op.name: op for op in ops.ALL}
    keys = [(known[op], backend, getattr(torch, s), getattr(torch, b), width) for op, backend, s, b, width in pending]
    torch.zeros(1, device=device)
    print("ready", flush=True)
    for result in _check_all(keys, device):
        print(json.dumps([result.reason, result.seconds, result.was_compared]), flush=True)
        if not result.was_compared and device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # after a GPU fault every later check would fail too
                os._exit(RESTART)


if __name__ == "__main__":
    main()
