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

from ditfast.ops import backend, cache, selfcheck
from ditfast.ops.selfcheck import Result

HIDDEN_SIZES = (384, 768, 1024, 1152)  # S, B, L, XL
PRECISIONS = {  # dtype of the residual stream, of the branches
    "bf16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
}


def problems(device_type: str, hidden_sizes=HIDDEN_SIZES, precisions=tuple(PRECISIONS)) -> list[tuple]:
    """(op, stream dtype, branch dtype, width) of what a DiT of these sizes asks its kernels on such a device."""
    found = []
    for op in backend.OPS:
        if op == "qkv_attention":
            continue  # attention's kernels, which are checked as it uses them
        if op == "attention":
            halves = [PRECISIONS[p][1] for p in precisions if PRECISIONS[p][1] != torch.float32]
            kernels = [name for name in ("cuda", "triton") if backend.why_not(op, name, device_type) is None]
            found += [(f"{op}/{name}", t, t, d) for name in kernels for t in halves for d in (64, 72)]
            continue
        if op in ("patchify", "unpatchify", "patch_embed"):
            widths = [channels * p * p for channels in (4, 8) for p in (2, 4, 8)]
        else:
            widths = [4 * d if op == "mlp" else d for d in hidden_sizes]
        for precision in precisions:
            stream, branch = PRECISIONS[precision]
            if op in ("mlp", "patchify", "unpatchify"):
                stream = branch  # no residual stream enters
            found += [(op, stream, branch, width) for width in widths]
    return list(dict.fromkeys(found))


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
    device = _device(device)
    for name in precisions:
        if name not in PRECISIONS:
            raise ValueError(f"precisions must be among {', '.join(PRECISIONS)}, got {name!r}")
    results = []
    for result in _check_all(problems(device.type, hidden_sizes, precisions), device):
        results.append(result)
        progress(result)
    return results


def verify_apart(hidden_sizes=HIDDEN_SIZES, precisions=tuple(PRECISIONS)) -> Iterator[Result]:
    """As `verify`, in a process of its own; yields results as they come."""
    device = _device(None)
    pending = problems(device.type, hidden_sizes, precisions)
    while pending:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "ditfast.ops.verify"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        keys = [[op, _name(stream), _name(branch), width] for op, stream, branch, width in pending]
        process.stdin.write(json.dumps([str(device), keys]))
        process.stdin.close()
        for line in process.stdout:
            op, stream, branch, width = pending.pop(0)
            reason, seconds = json.loads(line)
            yield Result(op, stream, branch, width, reason, seconds)
        if process.wait() != 0 and pending:
            key = pending.pop(0)
            cache.store(device, selfcheck.label(*key), False)
            yield Result(*key, f"the process died, exit status {process.returncode}", time.perf_counter() - start)


def _check_all(pending, device):
    for key in pending:
        result = selfcheck.check(*key, device)
        selfcheck.remember(*key, device, result.reason is None)
        yield result


def _device(device):
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    reason = backend.why_not("layer_norm_modulate", "triton", device.type)
    if reason is not None:
        raise RuntimeError(f"there is nothing to verify here: {reason}")
    return device


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def main() -> None:
    device, pending = json.load(sys.stdin)
    device = torch.device(device)
    keys = [(op, getattr(torch, stream), getattr(torch, branch), width) for op, stream, branch, width in pending]
    for result in _check_all(keys, device):
        print(json.dumps([result.reason, result.seconds]), flush=True)
        if result.reason is not None and device.type == "cuda":
            torch.cuda.synchronize()  # after a fault every later check would fail too: die, and let a fresh one go on


if __name__ == "__main__":
    main()
