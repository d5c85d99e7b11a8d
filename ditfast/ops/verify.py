"""Run the self-check ahead of time, for the shapes that DiT models have, and keep the answers.

`verify` runs it in this process. `verify_apart` runs it in another one, which a kernel may crash without harm: the
kernel is then known to fail, and the rest is checked by a fresh process.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from ditfast import ops
from ditfast.ops.backends import cache, selfcheck
from ditfast.ops.backends.availability import why_not
from ditfast.ops.backends.selfcheck import Result
from ditfast.ops.op import PRECISIONS

HIDDEN_SIZES = (384, 768, 1024, 1152)  # S, B, L, XL


def kernels_to_check(device_type: str, hidden_sizes=HIDDEN_SIZES, precisions=tuple(PRECISIONS)) -> list[tuple]:
    """(op, backend, stream dtype, branch dtype, width) of all that a DiT of these sizes may run on such a device."""
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
            if precision in op.checked and precision in op.backends[backend]
            for width in widths
        ]
    return found


def verify(
    device=None,
    hidden_sizes=HIDDEN_SIZES,
    precisions=tuple(PRECISIONS),
    progress: Callable[[Result], None] = lambda result: None,
) -> list[Result]:
    """Check every kernel on this machine now, whatever the cache says, and keep the answers.

    Args:
        device: a device or its name; None for the current CUDA device.
        hidden_sizes: D of the models of interest.
        precisions: any of "bf16", "autocast", "fp16", "fp32".
        progress: called with each result.

    Raises:
        ValueError: an unknown precision.
        RuntimeError: no kernel can run on the device.
    """
    for name in precisions:
        if name not in PRECISIONS:
            raise ValueError(f"precisions must be among {', '.join(PRECISIONS)}, got {name!r}")
    device = _device(device)
    results = []
    for result in _check_all(_some(kernels_to_check(device.type, hidden_sizes, precisions), device), device):
        results.append(result)
        progress(result)
    return results


def verify_apart(hidden_sizes=HIDDEN_SIZES, precisions=tuple(PRECISIONS)) -> Iterator[Result]:
    """As `verify`, in a process of its own; yields results as they come."""
    device = _device(None)
    pending = _some(kernels_to_check(device.type, hidden_sizes, precisions), device)
    while pending:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "ditfast.ops.verify"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        keys = [[op.name, backend, _name(s), _name(b), width] for op, backend, s, b, width in pending]
        process.stdin.write(json.dumps([str(device), keys]))
        process.stdin.close()
        for line in process.stdout:
            op, *key = pending.pop(0)
            reason, seconds = json.loads(line)
            yield Result(op.name, *key, reason, seconds)
        if process.wait() != 0 and pending:
            op, *key = pending.pop(0)
            cache.store(device, selfcheck.label(op, *key), False)
            reason = f"the process died, exit status {process.returncode}"
            yield Result(op.name, *key, reason, time.perf_counter() - start)


def _check_all(pending, device):
    for key in pending:
        result = selfcheck.check(*key, device)
        selfcheck.remember(key[0], result, device)
        yield result


def _device(device):
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def _some(found, device):
    if not found:
        reasons = dict.fromkeys(why_not(op, name, device.type) for op in ops.ALL for name in op.kernels)
        raise RuntimeError(f"there is nothing to verify here: {'; '.join(filter(None, reasons))}")
    return found


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def main() -> None:
    device, pending = json.load(sys.stdin)
    device, known = torch.device(device), {op.name: op for op in ops.ALL}
    keys = [(known[op], backend, getattr(torch, s), getattr(torch, b), width) for op, backend, s, b, width in pending]
    for result in _check_all(keys, device):
        print(json.dumps([result.reason, result.seconds]), flush=True)
        if result.reason is not None and device.type == "cuda":
            torch.cuda.synchronize()  # after a fault every later check would fail too: die, and let a fresh one go on


if __name__ == "__main__":
    main()
