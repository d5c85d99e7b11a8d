"""Attention in this package and others. Every function maps packed qkv (B, N, 3*H*d) to (B, N, H*d).

So a peer's time includes splitting qkv and packing the gradients of q, k and v.
"""

from contextlib import suppress
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast import ops
from ditfast.ops.backends.availability import why_not

SDPA = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def implementations(device: str) -> dict:
    """{name: function(qkv, heads)} for all implementations available on this type of device."""
    found = {"sdpa": _sdpa}
    if device == "cuda":
        found = {name: partial(_forced, kind) for name, kind in SDPA.items()}
    for name, load in (("flash-attn-2", _flash2), ("flash-attn-3", _flash3)):
        with suppress(ImportError):
            found[name] = load()
    for backend in ("cuda", "triton", "host"):
        is_timed = backend != "triton" or device == "cuda"  # the interpreter verifies in other benchmarks
        if is_timed and why_not(ops.ATTENTION, backend, device) is None:
            found[f"ditfast-{backend}"] = partial(ops.attention, backend=backend)
    return found


def _sdpa(qkv, heads):
    b, n, width = qkv.shape
    q, k, v = qkv.view(b, n, 3, heads, -1).permute(2, 0, 3, 1, 4)  # (B, H, N, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, width // 3)


def _forced(kind, qkv, heads):
    with sdpa_kernel(kind):
        return _sdpa(qkv, heads)


def _flash2():
    function = import_module("flash_attn").flash_attn_qkvpacked_func
    return lambda qkv, heads: function(qkv.unflatten(-1, (3, heads, -1))).flatten(2)


def _flash3():
    function = import_module("flash_attn_interface").flash_attn_qkvpacked_func
    return lambda qkv, heads: _first(function(qkv.unflatten(-1, (3, heads, -1)))).flatten(2)


def _first(found):
    """Drop the log-sum-exp that some versions also return."""
    return found[0] if isinstance(found, tuple) else found


def kernels_seen(run, device: str) -> list[str]:
    """Names of the kernels ``run()`` launches; on the CPU, of the attention operations it calls.

    [] if the profiler does not work on this machine, as for lack of a permission.
    """
    try:
        return _profiled(run, device)
    except RuntimeError:
        return []


def _profiled(run, device):
    kind = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as profile:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    events = profile.events()
    if device == "cuda":
        events = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    else:
        events = [e for e in events if "attention" in e.name and "::" in e.name and "evaluate_function" not in e.name]
    return list(dict.fromkeys(e.name for e in events))
