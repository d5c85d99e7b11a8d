"""Call the extension's CPU kernels, which take addresses and strides, not tensors.

What comes from outside passes `ditfast.ops.addresses` first; outputs are allocated here, as the kernels write them.
The kernels take one dtype for the residual stream and one for branches; shift, scale, gate and bias may have any.
Other mixtures run in float32 and are rounded once.
"""

import torch

from ditfast.kernels.strides import unit_stride
from ditfast.ops.addresses import address_or_null, contiguous, contiguous_or_null, matrix, strided, with_unit_stride

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType of csrc/host/calls.h
_ROWS = "x", "y", "gate", "bias", "shift", "scale", "x_new", "h"
_TANGENTS = tuple(f"{name}_t" for name in _ROWS)


def _extension():
    from ditfast import _C

    return _C


def product(a, b, bias=None):
    """a (M, K) @ b (K, N) + bias (N,) or None in float32, M, K, N > 0; of each matrix one stride is 1."""
    c = a.new_empty(a.shape[0], b.shape[1])
    _product_into(c, None, a, b, bias)
    return c


def product_gelu(a, b, bias, keep_product: bool):
    """`product`, or None unless kept, and GELU (tanh) of it: (M, N) each."""
    act = a.new_empty(a.shape[0], b.shape[1])
    c = torch.empty_like(act) if keep_product else None
    _product_into(c, act, a, b, bias)
    return c, act


def _product_into(c, act, a, b, bias):
    (rows, inner), columns = a.shape, b.shape[1]
    left = matrix("a", a, (rows, inner)), *a.stride()
    right = matrix("b", b, (inner, columns)), *b.stride()[::-1]
    pointers = contiguous_or_null("bias", bias, torch.float32, (columns,)), address_or_null(c), address_or_null(act)
    _extension().gemm((rows, columns, inner), left, right, *pointers, torch.get_num_threads())


def gelu(pre):
    """GELU (tanh) of pre (M, F), contiguous."""
    return _gelu_into(pre.new_empty(*pre.shape), pre)


def gelu_(pre):
    """Overwrite pre (M, F) with its GELU (tanh)."""
    return _gelu_into(pre, pre)


def _gelu_into(act, pre):
    pointers = contiguous("pre", pre, pre.dtype, pre.shape), act.data_ptr()
    _extension().gelu_forward(CODES[pre.dtype], *pre.shape, *pointers, torch.get_num_threads())
    return act


def gelu_jvp(pre, pre_t):
    """GELU (tanh) of pre (M, F), and its tangent. The inputs need not be contiguous."""
    pre, pre_t = pre.contiguous(), pre_t.contiguous()
    act, act_t = pre.new_empty(*pre.shape), pre.new_empty(*pre.shape)
    inputs = (contiguous(name, t, pre.dtype, pre.shape) for name, t in (("pre", pre), ("pre_t", pre_t)))
    pointers = *inputs, act.data_ptr(), act_t.data_ptr()
    _extension().gelu_jvp(CODES[pre.dtype], pre.numel(), *pointers, torch.get_num_threads())
    return act, act_t


def gelu_backward_(dact, pre, keep_act: bool):
    """Overwrite dact (M, F) with the gradient before GELU; also act (M, F), if kept, and dbias (F,)."""
    act = pre.new_empty(*pre.shape) if keep_act else None
    dbias = pre.new_empty(pre.shape[1])
    inputs = [contiguous(name, t, pre.dtype, pre.shape) for name, t in (("pre", pre), ("dact", dact))]
    pointers = inputs[0], address_or_null(act), inputs[1], dbias.data_ptr()
    _extension().gelu_backward(CODES[pre.dtype], *pre.shape, *pointers, torch.get_num_threads())
    return act, dbias


def layer_norm_modulate(x, shift, scale, eps, out_dtype):
    """h (B, N, D), and mean and rstd of the rows of x (B, N)."""
    h = x.new_empty(*x.shape, dtype=out_dtype)
    mean, rstd = _statistics(x)
    _forward(eps, x, None, None, None, shift, scale, None, h, mean, rstd)
    return h, mean, rstd


def layer_norm_modulate_jvp(x, shift, scale, eps, out_dtype, x_t, shift_t, scale_t):
    """h (B, N, D), mean and rstd of the rows of x (B, N), and the tangent of h. A tangent of None is zero."""
    h, h_t = (x.new_empty(*x.shape, dtype=out_dtype) for _ in range(2))
    mean, rstd = _statistics(x)
    tangents = x_t, None, None, None, shift_t, scale_t, None, h_t
    _jvp(eps, (x, None, None, None, shift, scale, None, h), mean, rstd, tangents)
    return h, mean, rstd, h_t


def layer_norm_modulate_backward(dh, x, scale, mean, rstd):
    """dx (B, N, D), and (2, B, D): dshift, dscale."""
    dx, modulation = x.new_empty(*x.shape), scale.new_empty(2, *scale.shape)
    sums = None, *modulation, None
    _backward(None, dh, x, None, None, None, scale, mean, rstd, dx, None, sums)
    return dx, modulation


def gated_residual(x, y, gate, bias):
    """x + gate * (y + bias), (B, N, D)."""
    x_new = x.new_empty(*x.shape)
    _forward(0.0, x, y, gate, bias, None, None, x_new, None, None, None)
    return x_new


def gated_residual_jvp(x, y, gate, bias, x_t, y_t, gate_t, bias_t):
    """x + gate * (y + bias), (B, N, D), and its tangent. A tangent of None is zero."""
    x_new, x_new_t = x.new_empty(*x.shape), x.new_empty(*x.shape)
    tangents = x_t, y_t, gate_t, bias_t, None, None, x_new_t, None
    _jvp(0.0, (x, y, gate, bias, None, None, x_new, None), None, None, tangents)
    return x_new, x_new_t


def gated_residual_backward(dout, y, gate, bias):
    """dy, dgate, dbias (dx is dout itself); dbias is empty without a bias."""
    dy, dgate, dbias = y.new_empty(*y.shape), gate.new_empty(*gate.shape), _dbias(gate, bias)
    sums = dgate, None, None, dbias
    _backward(dout, None, None, y, gate, bias, None, None, None, None, dy, sums)
    return dy, dgate, dbias


def junction(x, y, gate, shift, scale, eps, bias, out_dtype):
    """x_new, h (B, N, D), and mean and rstd of the rows of x_new (B, N)."""
    x_new, h = x.new_empty(*x.shape), x.new_empty(*x.shape, dtype=out_dtype)
    mean, rstd = _statistics(x)
    _forward(eps, x, y, gate, bias, shift, scale, x_new, h, mean, rstd)
    return x_new, h, mean, rstd


def junction_jvp(x, y, gate, shift, scale, eps, bias, out_dtype, x_t, y_t, gate_t, shift_t, scale_t, bias_t):
    """x_new, h (B, N, D), mean and rstd of the rows of x_new (B, N), and the tangents of x_new and h.

    A tangent of None is zero.
    """
    (x_new, x_new_t), (h, h_t) = ([x.new_empty(*x.shape, dtype=t) for _ in range(2)] for t in (x.dtype, out_dtype))
    mean, rstd = _statistics(x)
    tangents = x_t, y_t, gate_t, bias_t, shift_t, scale_t, x_new_t, h_t
    _jvp(eps, (x, y, gate, bias, shift, scale, x_new, h), mean, rstd, tangents)
    return x_new, h, mean, rstd, x_new_t, h_t


def junction_backward(dx_new, dh, x_new, y, gate, scale, bias, mean, rstd):
    """dx, dy (B, N, D), (3, B, D): dgate, dshift, dscale, and dbias (D,) or empty."""
    dx, dy = x_new.new_empty(*x_new.shape), y.new_empty(*y.shape)
    modulation, dbias = scale.new_empty(3, *scale.shape), _dbias(gate, bias)
    _backward(dx_new, dh, x_new, y, gate, bias, scale, mean, rstd, dx, dy, (*modulation, dbias))
    return dx, dy, modulation, dbias


def patchify(x, patch_size, channels_last):
    """(B, C, Hh, Ww) -> (B, N, C*p*p)."""
    b, c, height, width = x.shape
    p = patch_size
    grid = height // p, width // p
    tokens = x.new_empty(b, grid[0] * grid[1], c * p * p)
    _move_patches("patchify", x, tokens, grid, p, channels_last)
    return tokens


def unpatchify(tokens, patch_size, grid_h, grid_w, channels_last):
    """(B, N, C*p*p) -> (B, C, Hh, Ww)."""
    p, tokens = patch_size, unit_stride(tokens)
    image = tokens.new_empty(tokens.shape[0], tokens.shape[2] // (p * p), grid_h * p, grid_w * p)
    _move_patches("unpatchify", image, tokens, (grid_h, grid_w), p, channels_last)
    return image


def _move_patches(name, image, tokens, grid, patch_size, channels_last):
    (batch, channels), (rows, columns), p = image.shape[:2], grid, patch_size
    source = strided("image", image, tokens.dtype, (batch, channels, rows * p, columns * p))
    target = with_unit_stride("tokens", tokens, tokens.dtype, (batch, rows * columns, channels * p * p))
    getattr(_extension(), name)(
        *(image.element_size(), (batch, channels, *grid, p), channels_last),
        *(source, image.stride(), target, tokens.stride()[:2], torch.get_num_threads()),
    )


def norm(tensors):
    """L2 norm of all tensors, of one dtype, together: () float32. None of them need be contiguous."""
    tensors, dtype = [t.contiguous() for t in tensors], tensors[0].dtype
    addresses = [contiguous("tensors", t, dtype, t.shape) for t in tensors]
    value = _extension().norm(CODES[dtype], addresses, [t.numel() for t in tensors], torch.get_num_threads())
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _statistics(x):
    return [x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2)]


def _dbias(gate, bias):
    return gate.new_empty(0) if bias is None else bias.new_empty(*bias.shape)


def _forward(eps, x, y, gate, bias, shift, scale, x_new, h, mean, rstd):
    branch, shape = _branch_dtype(y, h), tuple(x.shape)
    rows = _readable((x, y, gate, bias, shift, scale, x_new, h), x.dtype, branch)
    _extension().rows_forward(
        *(CODES[x.dtype], CODES[branch], shape, eps, *_rows(_ROWS, rows, x.dtype, branch, shape)),
        *(address_or_null(mean), address_or_null(rstd), torch.get_num_threads()),
    )
    _deliver(rows[-1], h)


def _jvp(eps, primals, mean, rstd, tangents):
    """primals and tangents: x, y, gate, bias, shift, scale, and outputs x_new and h; None if the call has none."""
    (x, y, *_, h), h_t = primals, tangents[-1]
    branch, shape = _branch_dtype(y, h), tuple(x.shape)
    primals, tangents = (_readable(rows, x.dtype, branch) for rows in (primals, tangents))
    _extension().rows_jvp(
        *(CODES[x.dtype], CODES[branch], shape, eps, *_rows(_ROWS, primals, x.dtype, branch, shape)),
        *(address_or_null(mean), address_or_null(rstd), *_rows(_TANGENTS, tangents, x.dtype, branch, shape)),
        torch.get_num_threads(),
    )
    _deliver(primals[-1], h)
    _deliver(tangents[-1], h_t)


def _readable(rows, stream, branch):
    """x, y, gate, bias, shift, scale, x_new and h in layouts and dtypes that the kernels accept."""
    x, y, *vectors, x_new, h = rows
    return _dense(x, stream), _dense(y, branch), *map(_dense, vectors), x_new, _buffer_for(h, branch)


def _rows(names, rows, stream, branch, shape):
    x, y, *vectors, x_new, h = rows
    return (
        *(_tokens(names[0], x, stream, shape), _tokens(names[1], y, branch, shape)),
        *[_vectors(name, v, shape) for name, v in zip(names[2:], vectors, strict=False)],
        *(_output(x_new), _output(h)),
    )


def _backward(dx_new, dh, x_new, y, gate, bias, scale, mean, rstd, dx, dy, sums):
    stream, branch = (dx_new if x_new is None else x_new).dtype, _branch_dtype(y, dh)
    dy_out = _buffer_for(dy, branch)
    dx_new, x_new, dh, y = _dense(dx_new, stream), _dense(x_new, stream), _dense(dh, branch), _dense(y, branch)
    gate, bias, scale = _dense(gate), _dense(bias), _dense(scale)
    shape = tuple((y if dh is None else dh).shape)
    _extension().rows_backward(
        *(CODES[stream], CODES[branch], shape),
        *(_tokens("dx_new", dx_new, stream, shape), _tokens("dh", dh, branch, shape)),
        *(_tokens("x_new", x_new, stream, shape), _tokens("y", y, branch, shape)),
        *(_vectors("gate", gate, shape), _vectors("bias", bias, shape), _vectors("scale", scale, shape)),
        *(contiguous_or_null(name, t, torch.float32, shape[:2]) for name, t in (("mean", mean), ("rstd", rstd))),
        *(_output(dx), _output(dy_out), *map(_sum, sums), torch.get_num_threads()),
    )
    _deliver(dy_out, dy)


def _branch_dtype(*tensors):
    """The common dtype of the tensors; float32 if they differ."""
    dtypes = {t.dtype for t in tensors if t is not None}
    return dtypes.pop() if len(dtypes) == 1 else torch.float32


def _buffer_for(out, dtype):
    """``out``, or a buffer for it if the kernel writes another dtype."""
    return out if out is None or out.dtype == dtype else out.new_empty(*out.shape, dtype=dtype)


def _deliver(written, out):
    if written is not out:
        out.copy_(written)


def _dense(t, dtype=None):
    """``t`` in ``dtype`` with unit stride in its last dimension; copied only if needed."""
    return None if t is None else unit_stride(t if dtype is None else t.to(dtype))


def _tokens(name, t, dtype, shape):
    return None if t is None else (with_unit_stride(name, t, dtype, shape), t.stride(0), t.stride(1))


def _vectors(name, v, shape):
    """(B, D), or (D,)."""
    if v is None:
        return None
    is_matrix = v.dim() == 2
    address = with_unit_stride(name, v, v.dtype, (shape[0], shape[2]) if is_matrix else shape[2:])
    return address, CODES[v.dtype], v.stride(0) if is_matrix else 0


def _output(t):
    return None if t is None else (t.data_ptr(), t.stride(0), t.stride(1))


def _sum(v):
    return None if v is None else (v.data_ptr(), CODES[v.dtype], v.stride(0) if v.dim() == 2 else 0)
