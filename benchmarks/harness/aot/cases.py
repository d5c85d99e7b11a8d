"""Calls of each launcher on tensors with the model's shapes and dtypes."""

from contextlib import contextmanager

import torch

JUNCTION = "gated_residual_layer_norm_modulate"


def launch(case, arch):
    """Call the forward and backward launchers of ``case["op"]``, or its jvp; the tensors' values do not matter."""
    branch = getattr(torch, case["dtype"])
    stream = getattr(torch, case.get("stream_dtype", case["dtype"]))
    with on_architecture(arch, case.get("choice", 0)):
        globals()[f"_{case['op']}"](tuple(case["shape"]), stream, branch)


def row_bytes(case, kernel):
    """Bytes "loaded" and "stored" per column of a token's row, by one row kernel; for tangents, by all."""
    branch = getattr(torch, case["dtype"]).itemsize
    stream = getattr(torch, case.get("stream_dtype", case["dtype"])).itemsize
    loaded, stored = {
        ("layer_norm_modulate", "forward_kernel"): (stream, branch),  # x; h
        ("layer_norm_modulate", "backward_kernel"): (branch + stream, stream),  # dh, x; dx
        ("layer_norm_modulate_jvp", "jvp_kernel"): (2 * stream, 2 * branch),
        ("gated_residual", "forward_kernel"): (stream + branch, stream),  # x, y; out
        ("gated_residual", "backward_kernel"): (stream + branch, branch),  # dout, y; dy
        ("gated_residual_jvp", "jvp_kernel"): (2 * (stream + branch), 2 * stream),
        (JUNCTION, "forward_kernel"): (stream + branch, stream + branch),  # x, y; x_new, h
        (JUNCTION, "backward_kernel"): (2 * (stream + branch), stream + branch),  # dx_new, x_new, dh, y; dx, dy
        (f"{JUNCTION}_jvp", "jvp_kernel"): (2 * (stream + branch), 2 * (stream + branch)),
    }[case["op"], kernel]
    return {"loaded": loaded, "stored": stored}


@contextmanager
def on_architecture(arch, choice):
    """Make launchers see a GPU of compute capability ``arch``, e.g. 90, and use its tiles number ``choice``."""
    from ditfast.kernels import attention

    capability, tiles = attention.capability, attention.tiles
    attention.capability = lambda device: divmod(arch, 10)
    attention.tiles = lambda qkv, kernel: tiles(qkv, kernel, choice)
    try:
        yield
    finally:
        attention.capability, attention.tiles = capability, tiles


def _tensors(shape, stream, branch):
    b, _, d = shape
    x, y = torch.empty(shape, dtype=stream), torch.empty(shape, dtype=branch)
    shift, scale, gate = torch.empty(b, 6 * d, dtype=branch).chunk(6, dim=1)[:3]
    return x, y, shift, scale, gate, torch.empty(d, dtype=stream)


def _layer_norm_modulate(shape, stream, branch):
    from ditfast.kernels import layer_norm_modulate as kernel

    x, y, shift, scale, _, _ = _tensors(shape, stream, branch)
    h, mean, rstd = kernel.forward(x, shift, scale, 1e-6, branch)
    kernel.backward(h, x, scale, mean, rstd)


def _layer_norm_modulate_jvp(shape, stream, branch):
    from ditfast.kernels import layer_norm_modulate as kernel

    x, _, shift, scale, _, _ = _tensors(shape, stream, branch)
    for x_t in (x, None):
        kernel.jvp(x, shift, scale, 1e-6, branch, x_t, shift, scale)


def _gated_residual(shape, stream, branch):
    from ditfast.kernels import gated_residual as kernel

    x, y, _, _, gate, bias = _tensors(shape, stream, branch)
    kernel.forward(x, y, gate, bias)
    kernel.backward(x, y, gate, bias)


def _gated_residual_jvp(shape, stream, branch):
    from ditfast.kernels import gated_residual as kernel

    x, y, _, _, gate, bias = _tensors(shape, stream, branch)
    for x_t, b in ((x, bias), (None, None)):
        kernel.jvp(x, y, gate, b, x_t, y, gate, b)


def _gated_residual_layer_norm_modulate(shape, stream, branch):
    from ditfast.kernels import junction as kernel

    x, y, shift, scale, gate, bias = _tensors(shape, stream, branch)
    x_new, h, mean, rstd = kernel.forward(x, y, gate, shift, scale, 1e-6, bias, branch)
    kernel.backward(x, h, x_new, y, gate, scale, bias, mean, rstd)


def _gated_residual_layer_norm_modulate_jvp(shape, stream, branch):
    from ditfast.kernels import junction as kernel

    x, y, shift, scale, gate, bias = _tensors(shape, stream, branch)
    for x_t, b in ((x, bias), (None, None)):
        kernel.jvp(x, y, gate, shift, scale, 1e-6, b, branch, x_t, y, gate, shift, scale, b)


def _mlp(shape, stream, branch):
    from ditfast.kernels import gelu

    b, n, d = shape
    pre = torch.empty(b * n, 4 * d, dtype=branch)
    gelu.backward_(torch.empty_like(pre), pre, True, branch)
    gelu.backward_(torch.empty_like(pre), pre, False, branch)


def _mlp_jvp(shape, stream, branch):
    from ditfast.kernels import gelu

    b, n, d = shape
    pre = torch.empty(b * n, 4 * d, dtype=branch)
    gelu.jvp(pre, pre)


def _patches(shape, stream, branch):
    from ditfast.kernels import patches

    b, n, d = shape
    side = round(n**0.5)
    for p in (2, 4, 8):
        x, weight = torch.empty(b, 4, side * p, side * p, dtype=branch), torch.empty(d, 4 * p * p, dtype=branch)
        patches.patch_embed(x, weight, torch.empty(d, dtype=branch), torch.empty(n, d, dtype=stream), p, stream)
        patches.unpatchify(patches.patchify(x, p, True), p, side, side, True)


def _attention(shape, stream, branch):
    from ditfast.kernels import attention

    qkv, heads = _heads(shape, branch)
    out, lse = attention.forward(qkv, heads, 0.125)
    for bias_dtype in (None, stream):
        attention.backward(out, qkv, out, lse, 0.125, bias_dtype)


def _attention_jvp(shape, stream, branch):
    from ditfast.kernels import attention_jvp

    qkv, heads = _heads(shape, branch)
    attention_jvp.jvp(qkv, qkv, heads, 0.125)


def _heads(shape, branch):
    b, n, d = shape
    return torch.empty(b, n, 3 * d, dtype=branch), d // 72 if d % 72 == 0 else d // 64
