"""Whether the kernels are right on this machine, asked before the automatic choice takes one.

On first use of (operation, dtypes, width) the kernels run forward and backward on a small made-up problem and are
held to the numerical contract. The answer is kept in memory and on disk (`ditfast.ops.cache`).
``DITFAST_SELFCHECK=0`` trusts every kernel.
"""

import contextlib
import os
import threading
import time
import warnings
from dataclasses import dataclass
from importlib import import_module

import torch

from ditfast.ops import backend, cache, contract

SAMPLES, TOKENS = 2, 1100  # enough that a program walks over several tokens
ATTENTION_TOKENS = 333  # several tiles and a rest

_answers: dict[tuple, bool] = {}
_lock = threading.RLock()


@dataclass(frozen=True)
class Result:
    """One answer: ``reason`` is None if the kernels of ``op`` keep the contract."""

    op: str
    stream: torch.dtype
    branch: torch.dtype
    width: int
    reason: str | None
    seconds: float


def trusted(op: str, stream: torch.dtype, branch: torch.dtype, width: int, device: torch.device) -> bool:
    """Whether the automatic choice may take the kernels of ``op``; decided once per process."""
    key = (op, stream, branch, width, device)
    answer = _answers.get(key)
    return _decide(key) if answer is None else answer


def label(op, stream, branch, width) -> str:
    """Name of an answer on disk and in messages."""
    return f"{op} {stream} {branch} {width}".replace("torch.", "")


def remember(op, stream, branch, width, device, answer: bool) -> None:
    """Keep an answer in memory and on disk."""
    cache.store(device, label(op, stream, branch, width), answer)
    _answers[op, stream, branch, width, device] = answer


def _decide(key) -> bool:
    if os.environ.get("DITFAST_SELFCHECK") == "0":
        return True
    *problem, device = key
    with _lock:
        if key in _answers:
            return _answers[key]
        answer = cache.load(device).get(label(*problem))
        if answer is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return False  # a check cannot run now; the next call outside of a capture makes it
            answer = check(*key).reason is None
            remember(*key, answer)
        _answers[key] = answer
    if not answer:
        _warn(label(*problem), device)
    return answer


def _warn(name, device):
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    warnings.warn(
        f"ditfast: the kernels of {name} failed their self-check on {where} and are not used; "
        "`python -m ditfast.doctor --verify` shows why",
        RuntimeWarning,
        stacklevel=2,
    )


def check(op: str, stream: torch.dtype, branch: torch.dtype, width: int, device: torch.device) -> Result:
    """Run the kernels of ``op`` and compare; an exception counts as a failure. Global random state is not touched."""
    start = time.perf_counter()
    outer, backend._log = backend._log, None
    try:
        with on_device(device), torch.no_grad(), torch.autocast(device.type, enabled=False):
            kernel = op.partition("/")[2] or "triton"  # attention has two
            reason = _compare(_PROBLEMS[op], kernel, stream, branch, width, device)
    except Exception as error:  # a kernel that does not compile or launch is not used
        reason = f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        backend._log = outer
    return Result(op, stream, branch, width, reason, time.perf_counter() - start)


def on_device(device):
    """A context in which kernels are launched on ``device``."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _compare(problem, kernel, stream, branch, width, device):
    inputs = _Inputs(stream, branch, device)
    got = problem(inputs, width, kernel)
    low = problem(inputs.again(), width, "reference")
    ref = problem(inputs.again(torch.float64), width, "reference")
    for name in got:
        per_sample = name not in ("dbias", "dw1", "db1", "dw2", "db2", "dweight", "dpos")
        reason = contract.violation(got[name], low[name], ref[name], per_sample)
        if reason is not None:
            return f"{name}: {reason}"
    return None


class _Inputs:
    """Random tensors, the same in every dtype that is asked for."""

    def __init__(self, stream, branch, device, override=None):
        self.stream, self.branch = override or stream, override or branch
        self._rounded, self._device = (stream, branch), device
        self._generator = torch.Generator().manual_seed(0)

    def again(self, override=None):
        return _Inputs(*self._rounded, self._device, override)

    def __call__(self, *shape, stream=False, scale=1.0):
        values = torch.randn(*shape, generator=self._generator) * scale
        values = values.to(self._rounded[0 if stream else 1])
        return values.to(self._device, self.stream if stream else self.branch)


def _row_tensors(t, d):
    rows = SAMPLES, TOKENS, d
    x, y = t(*rows, stream=True, scale=2.0), t(*rows)
    shift, scale, gate = t(SAMPLES, 6 * d).chunk(6, dim=1)[:3]
    return x, y, shift, scale, gate, t(d, stream=True), t(*rows, stream=True), t(*rows)


def _layer_norm_modulate(t, d, name):
    op = import_module("ditfast.ops.layer_norm_modulate")
    x, _, shift, scale, _, _, _, dh = _row_tensors(t, d)
    h, mean, rstd = op._forward(x, shift, scale, 1e-6, t.branch, name)
    dx, (dshift, dscale) = op._backward(dh, x, scale, mean, rstd, name)
    return {"h": h, "dx": dx, "dshift": dshift, "dscale": dscale}


def _gated_residual(t, d, name):
    op = import_module("ditfast.ops.gated_residual")
    x, y, _, _, gate, bias, dout, _ = _row_tensors(t, d)
    out = op._forward(x, y, gate, bias, name)
    dy, dgate, dbias = op._backward(dout, y, gate, bias, name)
    return {"out": out, "dy": dy, "dgate": dgate, "dbias": dbias}


def _junction(t, d, name):
    op = import_module("ditfast.ops.junction")
    x, y, shift, scale, gate, bias, dx_new, dh = _row_tensors(t, d)
    x_new, h, mean, rstd = op._forward(x, y, gate, shift, scale, 1e-6, bias, t.branch, name)
    grads = op._backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd, name)
    dx, dy, (dgate, dshift, dscale), dbias = grads
    named = {"dx": dx, "dy": dy, "dgate": dgate, "dshift": dshift, "dscale": dscale, "dbias": dbias}
    return {"x_new": x_new, "h": h} | named


def _mlp(t, f, name):
    op = import_module("ditfast.ops.mlp")
    d = 64
    h, w1, b1 = t(SAMPLES, TOKENS, d), t(f, d, scale=d**-0.5), t(f)
    w2, b2, dy = t(d, f, scale=f**-0.5), t(d), t(SAMPLES, TOKENS, d)
    result = {}
    for recompute in (False, True):
        y, pre, act = op._forward(h, w1, b1, w2, b2, recompute, name)
        result["y"], pre = y, pre.clone()
        grads = op._backward(dy, h, w1, w2, pre, act, [True] * 5, name)
        result |= dict(zip(("dh", "dw1", "db1", "dw2", "db2"), grads, strict=True))
    return result


def _patches(t, k, name):
    op = import_module("ditfast.ops.patches")
    p, c, d = _factor(k), 0, 96
    c = k // (p * p)
    x, weight, bias = t(SAMPLES, c, 6 * p, 4 * p), t(d, k, scale=k**-0.5), t(d)
    pos, dout = t(24, d, stream=True), t(SAMPLES, 24, d, stream=True)
    out = op._embed(x, weight, bias, pos, p, t.stream, name)
    grads = op._embed_backward(dout, x, weight, p, [True] * 4, name)
    tokens = op._patchify(x, p, True, name)
    image = op._unpatchify(tokens, p, 6, 4, True, name)
    named = dict(zip(("dx", "dweight", "dbias", "dpos"), grads, strict=True))
    return {"out": out, "tokens": tokens, "image": image} | named


def _factor(k):
    """A patch size that divides a token of k elements."""
    return next(p for p in (8, 4, 2, 1) if k % (p * p) == 0 and (k // (p * p) >= 3 or p == 1))


def _attention(t, d, name):
    op, heads = import_module("ditfast.ops.attention"), 2
    qkv, dout = t(SAMPLES, ATTENTION_TOKENS, 3 * heads * d), t(SAMPLES, ATTENTION_TOKENS, heads * d)
    out, lse = op.forward(qkv, heads, d**-0.5, name)
    plain, _ = op.gradients(dout, qkv, out, lse, d**-0.5, name)
    dqkv, dbias = op.gradients(dout, qkv, out, lse, d**-0.5, name, t.branch)  # other code: as in qkv_attention
    dq, dk, dv = torch.cat((plain, dqkv), dim=1).chunk(3, dim=-1)
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dbias": dbias}


_PROBLEMS = {
    "attention/cuda": _attention,
    "attention/triton": _attention,
    "layer_norm_modulate": _layer_norm_modulate,
    "gated_residual": _gated_residual,
    "gated_residual_layer_norm_modulate": _junction,
    "mlp": _mlp,
    "patchify": _patches,
    "unpatchify": _patches,
    "patch_embed": _patches,
}
