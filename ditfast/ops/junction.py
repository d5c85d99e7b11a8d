"""gated_residual_layer_norm_modulate: the junction between two branches of a block, in one pass."""

from ditfast.ops import checks, reference
from ditfast.ops.backend import choose, note
from ditfast.ops.gated_residual import check as check_residual
from ditfast.ops.rows import linear_dtype, unsupported


def gated_residual_layer_norm_modulate(x, y, gate, shift, scale, eps: float = 1e-6, bias=None, *, backend=None):
    """End one branch and begin the next: ``x_new = x + gate * (y + bias)``, ``h = LN(x_new) * (1 + scale) + shift``.

    Args:
        x: (B, N, D) residual stream.
        y: (B, N, D) output of the branch that ends.
        gate: (B, D) of the branch that ends; shift, scale: (B, D) of the one that begins. Any stride between
            samples; (B, N, D), one row per token, runs on the reference.
        eps: added to the variance.
        bias: (D,) of the Linear that made y, which then runs without it.
        backend: see `ditfast.ops`.

    Returns:
        x_new: (B, N, D) in the dtype of x.
        h: (B, N, D) in the dtype of x; under autocast in the autocast dtype.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for by name cannot run.

    Source: Peebles & Xie, section 3.2, "adaLN-Zero block"; the fusion is this package's.
    """
    check_residual(x, y, gate, bias)
    checks.modulation("shift", shift, x)
    checks.modulation("scale", scale, x)
    name = choose(_OP, backend, x.device.type, unsupported(x, y, bias, gate, shift, scale))
    note(_OP, name)
    return reference.gated_residual_layer_norm_modulate(x, y, gate, shift, scale, eps, bias, linear_dtype(x))


_OP = "gated_residual_layer_norm_modulate"
