"""mlp: Linear, GELU (tanh), Linear in one operation."""

from ditfast.ops import checks, reference
from ditfast.ops.backend import choose, note


def mlp(h, w1, b1, w2, b2=None, recompute: bool = False, *, backend=None):
    """``gelu(h @ w1.T + b1) @ w2.T + b2`` with the tanh form of GELU.

    Args:
        h: (B, N, D) tokens.
        w1: (F, D), b1: (F,) of the first Linear; F is the MLP's width.
        w2: (D_out, F), b2: (D_out,) or None of the second.
        recompute: keep only the tensor before GELU for backward, and compute the activation again there.
        backend: see `ditfast.ops`.

    Returns:
        (B, N, D_out), in the dtype that ``torch.nn.functional.linear`` gives.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.
        RuntimeError: the backend asked for by name cannot run.

    Source: Peebles & Xie, section 3.2, "pointwise feedforward"; Hendrycks & Gimpel, "Gaussian Error Linear Units".
    """
    _check(h, w1, b1, w2, b2)
    name = choose(_OP, backend, h.device.type)
    note(_OP, name)
    return reference.mlp(h, w1, b1, w2, b2)


_OP = "mlp"


def _check(h, w1, b1, w2, b2):
    checks.tokens("h", h)
    for name, w in (("w1", w1), ("w2", w2)):
        checks.tensor(name, w, h)
        checks.rank(name, w, "(out, in)", 2)
    checks.shape("w1", w1, "(F, D)", (w1.shape[0], h.shape[-1]))
    checks.tensor("b1", b1, h)
    checks.shape("b1", b1, "(F,)", (w1.shape[0],))
    checks.shape("w2", w2, "(D_out, F)", (w2.shape[0], w1.shape[0]))
    if b2 is not None:
        checks.tensor("b2", b2, h)
        checks.shape("b2", b2, "(D_out,)", (w2.shape[0],))
