"""patch_embed: patches of an image, their projection, bias and position, in one pass."""

from math import prod

import torch
from torch import Tensor

from ditfast.kernels.strides import unit_stride
from ditfast.ops import checks, host, reference
from ditfast.ops.autocast import linear_dtype
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.availability import device_type, why_not_dtype
from ditfast.ops.backends.choice import choose
from ditfast.ops.backends.log import note
from ditfast.ops.backends.resolve import resolve
from ditfast.ops.op import WITH_STREAM, Backend, Op
from ditfast.ops.patches import PATCH, check_image, image_of, patch_of, run_patchify, run_unpatchify, widths
from ditfast.ops.registration import attach_autograd, register_op, reject_double_backward, run_in_backward


def patch_embed(
    x: Tensor, weight: Tensor, bias: Tensor, pos_embed: Tensor, patch_size: int, *, backend: Backend = None
) -> Tensor:
    """Embed patches with their position: ``patchify(x) @ weight.T + bias + pos_embed``.

    Args:
        x: (B, C, Hh, Ww) with Hh and Ww multiples of the patch size p.
        weight: (D, C, p, p); bias: (D,).
        pos_embed: (1, N, D) or (N, D), N = (Hh/p) * (Ww/p).
        patch_size: p, in pixels.
        backend: see `ditfast.ops`.

    Returns:
        (B, N, D) in the projection's dtype (autocast's if enabled) promoted with that of pos_embed: the residual
        stream stays float32 under autocast.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: a backend chosen by name cannot run.

    Source: Peebles & Xie, section 3.2, "Patchify".
    """
    check_image(x, patch_size)
    _check(x, weight, bias, pos_embed, patch_size)
    dtype = linear_dtype(x)

    def takes_host(is_able):
        width, elements = weight[0].numel(), x.shape[0] * pos_embed.numel()
        return on_cpu.takes_host(OP, pos_embed.dtype, dtype, width, elements, is_able)

    name = choose(OP, backend, device_type(x), why_not_dtype(x, weight, bias, pos_embed), takes_host)
    if name == "reference":
        note(OP.name, name)
        return reference.patch_embed(x, weight, bias, pos_embed, patch_size)
    x, weight, bias = (t.to(dtype) for t in (x, weight, bias))  # as autocast would, so that autograd sees it
    pos = pos_embed.reshape(pos_embed.shape[-2:])
    out_dtype = torch.promote_types(dtype, pos.dtype)
    return _call(x, weight.flatten(1), bias, pos, patch_size, out_dtype, name)


def _check(x, weight, bias, pos_embed, patch_size):
    p, n = patch_size, (x.shape[2] // patch_size) * (x.shape[3] // patch_size)
    device = x.device
    d = checks.ranked("weight", weight, "(D, C, p, p)", 4, device)[0]
    checks.tensor("weight", weight, "(D, C, p, p)", (d, x.shape[1], p, p))
    checks.tensor("bias", bias, "(D,)", (d,), device)
    checks.parameter_dtypes("x", x, weight=weight, bias=bias)
    if isinstance(pos_embed, Tensor) and pos_embed.dim() == 3:
        checks.tensor("pos_embed", pos_embed, "(1, N, D)", (1, n, d), device)
    else:
        checks.tensor("pos_embed", pos_embed, "(N, D)", (n, d), device)


def _forward(x, weight, bias, pos, patch_size, out_dtype, backend):
    check_image(x, patch_size)
    (_, c, height, width), p = x.shape, patch_size
    checks.tensor("weight", weight, "(D, C*p*p)", (weight.shape[0], c * p * p))
    checks.tensor("pos", pos, "(N, D)", ((height // p) * (width // p), weight.shape[0]))
    name = resolve(OP, backend, pos, x, weight.shape[1])
    if name == "triton":
        from ditfast.kernels import patches as kernels

        return kernels.patch_embed(x, weight.contiguous(), unit_stride(bias), unit_stride(pos), patch_size, out_dtype)
    patches = host.patchify(x, patch_size, False) if name == "host" else reference.patchify(x, patch_size)
    tokens = torch.nn.functional.linear(patches, weight, bias)
    return (tokens + pos).to(out_dtype).contiguous()


def _forward_fake(x, weight, bias, pos, patch_size, out_dtype, backend):
    p = patch_size
    n = (x.shape[2] // p) * (x.shape[3] // p)
    return x.new_empty(x.shape[0], n, weight.shape[0], dtype=out_dtype)


def _backward(dout, x, weight, patch_size, needs, backend):
    """Runs once per model: library GEMMs around the patch kernels."""
    b, n, d = dout.shape
    rows = dout.to(x.dtype).reshape(-1, d)  # (B*N, D)
    dx, dweight = x.new_empty(0), x.new_empty(0)  # outputs may not alias
    if needs[0]:
        grid = x.shape[2] // patch_size, x.shape[3] // patch_size
        dx = run_unpatchify((rows @ weight).view(b, n, weight.shape[1]), patch_size, *grid, False, backend)
    if needs[1]:
        patches = run_patchify(x, patch_size, False, backend)
        dweight = rows.t() @ patches.view(-1, weight.shape[1])
    dbias = dout.sum((0, 1), dtype=torch.float32).to(x.dtype) if needs[2] else x.new_empty(0)
    dpos = dout.sum(0, dtype=torch.float32).to(dout.dtype).contiguous() if needs[3] else dout.new_empty(0)
    return dx, dweight, dbias, dpos


def _backward_fake(dout, x, weight, patch_size, needs, backend):
    shapes = ((x, x.shape), (x, weight.shape), (x, weight.shape[:1]), (dout, dout.shape[1:]))
    return tuple(t.new_empty(shape if n else (0,)) for (t, shape), n in zip(shapes, needs, strict=True))


_forward_op = register_op(
    "patch_embed(Tensor x, Tensor weight, Tensor bias, Tensor pos, int patch_size, ScalarType out_dtype, str backend)"
    " -> Tensor",
    _forward,
    _forward_fake,
    {"x": "B,C,I,J", "weight": "D,K x", "bias": "D x", "pos": "N,D"},
    sample_dims=(0,),
    shared=("weight", "bias", "pos"),
)
_backward_op = register_op(
    "patch_embed_backward(Tensor dout, Tensor x, Tensor weight, int patch_size, bool[] needs, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
    {"dout": "B,N,D", "x": "B,C,I,J", "weight": "D,K x"},
)


def _setup_context(ctx, inputs, output):
    x, weight, _, _, ctx.patch_size, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight)


def _autograd_backward(ctx, dout):
    needs = list(ctx.needs_input_grad[:4])
    grads = run_in_backward(_backward_op, dout, *ctx.saved_tensors, ctx.patch_size, needs, ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None


reject_double_backward("patch_embed", _backward_op)


def _jvp(args, tangents):
    """Two calls: the operation is linear in (image, bias, position) and in the weight."""
    (x, weight, bias, pos, *rest), (x_t, weight_t, bias_t, pos_t) = args, tangents
    bias_t, pos_t = (torch.zeros_like(t) if t_t is None else t_t for t, t_t in ((bias, bias_t), (pos, pos_t)))
    out_t = _call(torch.zeros_like(x) if x_t is None else x_t, weight, bias_t, pos_t, *rest)
    if weight_t is not None:
        out_t = out_t + _call(x, weight_t, torch.zeros_like(bias), torch.zeros_like(pos), *rest)
    return _call(*args), (out_t,)


_call = attach_autograd("patch_embed", _forward_op, _setup_context, _autograd_backward, _jvp)


def _arguments(t, batch, tokens, dim):
    x = image_of(t, batch, tokens)
    channels, p = x.shape[1], PATCH
    return {
        "x": x,
        "weight": t(dim, channels, p, p, stream=True, spread=(channels * p * p) ** -0.5),
        "bias": t(dim, stream=True),
        "pos_embed": t(tokens, dim, stream=True),
        "patch_size": p,
    }


def _self_check(t, width, backend):
    (channels, p), tokens, dim = patch_of(width), 24, 96
    x, weight, bias = t(t.size[0], channels, 6 * p, 4 * p), t(dim, width, spread=width**-0.5), t(dim)
    pos, dout = t(tokens, dim, stream=True), t(t.size[0], tokens, dim, stream=True)
    out = _forward(x, weight, bias, pos, p, t.stream, backend)
    gradients = _backward(dout, x, weight, p, [True] * 4, backend)
    return {"out": out, **dict(zip(("dx", "dweight", "dbias", "dpos_embed"), gradients, strict=True))}


def _flops(x, weight, bias, pos, *_, **__):
    return 2 * x[0] * pos[0] * prod(weight)


def _backward_flops(dout, x, weight, patch_size, needs, *_, **__):
    return 2 * prod(dout[:-1]) * prod(weight) * (needs[0] + needs[1])


OP = Op(
    name="patch_embed",
    function=patch_embed,
    backends={"triton": WITH_STREAM, "host": WITH_STREAM, "reference": WITH_STREAM},
    arguments=_arguments,
    outputs=("out",),
    parameters=("weight", "bias", "pos_embed"),
    self_check=_self_check,
    auto_precisions=WITH_STREAM,
    widths=widths,
    flops={"patch_embed": _flops, "patch_embed_backward": _backward_flops},
    moved={"fwd": ("x", "out"), "bwd": ("dout", "x")},  # a model needs no gradient of its input
)
