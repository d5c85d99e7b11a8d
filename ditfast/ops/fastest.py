"""The automatic choice of attention: right on this machine by the self-check, then fastest here by measurement.

Asked once per (dtype, head dim, class of N) and device; the answer and its times are kept on disk with those of the
self-check. Under ``torch.compile`` the question is asked while tracing, so that PyTorch's own attention, where it
wins, stays visible to the compiler.
"""

import statistics

import torch

from ditfast.ops import backend, cache, selfcheck

CANDIDATES = ("cuda", "triton", "sdpa")
TOKENS, HEADS = 16384, 16  # of the problem that is timed

_choices: dict[tuple, str] = {}


def size_class(tokens: int) -> int:
    """N rounded up to a power of two, at least 64 and at most 4096: what the choice depends on."""
    return min(4096, max(64, 1 << max(0, tokens - 1).bit_length()))


def choose(dtype: torch.dtype, head_dim: int, tokens: int, device: torch.device) -> str:
    """ "cuda", "triton" or "sdpa"; PyTorch's while a CUDA graph is captured and the answer is not known."""
    key = (dtype, head_dim, size_class(tokens), device)
    return _choices.get(key) or _decide(key)


# what torch.compiler.assume_constant_result(choose) does, without importing the compiler for it
choose._dynamo_marked_constant = True


def label(dtype, head_dim, tokens) -> str:
    """Name of a choice on disk."""
    return f"attention {dtype} {head_dim} N<={size_class(tokens)}".replace("torch.", "")


def _decide(key) -> str:
    dtype, head_dim, tokens, device = key
    name = label(dtype, head_dim, tokens)
    known = cache.load(device).get(name)
    if known is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return "sdpa"
        known = {"choice": "sdpa", "us": {}}
        able = [c for c in CANDIDATES if _is_able(c, dtype, head_dim, device)]
        if able != ["sdpa"]:
            known["us"] = {c: measure(c, *key) for c in able}
            known["choice"] = min(known["us"], key=known["us"].get)
        cache.store(device, name, known)
    return _choices.setdefault(key, known["choice"])


def _is_able(candidate, dtype, head_dim, device):
    if candidate == "sdpa":
        return True
    can_run = backend.why_not("attention", candidate, device.type) is None
    return can_run and selfcheck.trusted(f"attention/{candidate}", dtype, dtype, head_dim, device)


def measure(candidate, dtype, head_dim, tokens, device) -> float:
    """Microseconds of forward and backward, the median of 10 after 3 to warm up."""
    from ditfast.ops.attention import attention

    generator = torch.Generator().manual_seed(0)
    shape = (max(1, TOKENS // tokens), tokens, 3 * HEADS * head_dim)
    plain = torch.autocast(device.type, enabled=False)
    with selfcheck.on_device(device), torch.enable_grad(), torch.inference_mode(False), plain:
        qkv = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        times = []
        for _ in range(13):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = attention(qkv, HEADS, backend=candidate)
            torch.autograd.grad(out, qkv, out.detach())
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
    return round(statistics.median(times[3:]), 1)
