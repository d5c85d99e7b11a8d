"""One pass for primal and tangent of the row operations meets the numerical contract."""

import pytest
import torch
from pairwise import pairwise

pytest.importorskip("triton")

from ops.row_jvps import EVERY, FILE, LN, RowJvp  # noqa: E402
from ops.row_ops import OUTPUTS  # noqa: E402

from ditfast.kernels import rows  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

GIVEN = {
    "all": EVERY,
    "without_x": ("y", "gate", "shift", "scale"),
    "modulation": ("gate", "shift", "scale"),
    "rows": ("x", "y"),
    "bias": ("bias",),
}
AXES = {
    "dtype": ("fp32", "fp16", "bf16", "mixed"),
    "n": (1, 5),
    "d": (8, 384, 1152),  # a masked block; two pieces; two pieces, the last masked
    "layouts": (("dense", "expanded"), ("strided", "permuted"), ("permuted", "strided")),  # of inputs, of tangents
    "given": tuple(GIVEN),
    "bias": (True, False),
    "chunk": (1, 4),
}


def makes_sense(op, c):
    """A missing bias has no tangent, and LN has no bias: the latter cases would be duplicates."""
    return (c["bias"] or (op != LN and c["given"] != "bias")) and (op, c["given"]) != (LN, "bias")


CASES = [
    {"op": op, **c} for op in FILE for c in pairwise(lambda c: c["n"] * (c["d"] + 500), **AXES) if makes_sense(op, c)
]


def label(c):
    bias = "bias" if c["bias"] else "nobias"
    return f"{c['op']}-{c['dtype']}-{c['n']}x{c['d']}-{'-'.join(c['layouts'])}-{c['given']}-{bias}-chunk{c['chunk']}"


@pytest.mark.parametrize("c", CASES, ids=label)
def test_contract(c, device, poisoned, monkeypatch):
    monkeypatch.setattr(rows, "_chunk_size", lambda *_, **__: c["chunk"])
    layout, tangent_layout = c["layouts"]
    RowJvp(
        c["op"], c["dtype"], 2, c["n"], c["d"], layout, c["bias"], device, GIVEN[c["given"]], tangent_layout
    ).assert_right()  # fmt: skip


@pytest.mark.parametrize("op", FILE)
def test_primal_equals_forwards(op, device):
    """Outputs and statistics."""
    case = RowJvp(op, "mixed", b=2, n=5, d=40, device=device)
    expected = case.kernel().forward(**case.primals(), **case.options())
    got = [t for name, t in case.by_kernel().items() if not name.endswith("_t")]
    for a, b in zip(got, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6 if a.dtype == torch.float32 else 2**-8, atol=1e-6)


@pytest.mark.parametrize("op", FILE)
def test_no_tangent_means_zeros(op, device, poisoned):
    case = RowJvp(op, "mixed", b=2, n=5, d=40, device=device)
    zeros = {name: torch.zeros_like(t) for name, t in case.primals().items()}
    for a, b in zip(*(case.by_kernel(t).values() for t in (dict.fromkeys(zeros), zeros)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", FILE)
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # from numpy, in the interpreter
def test_nan_and_inf_propagate(op, value, device):
    """A tangent's NaN or infinity appears only in its own row."""
    case = RowJvp(op, b=3, n=5, d=40, device=device)
    tangents = case.tangents()
    tangents["x"][1, 2, 3] = value
    found = case.by_kernel(tangents)
    for name in OUTPUTS[op]:
        assert torch.isfinite(found[name]).all()
        is_finite = torch.isfinite(found[f"{name}_t"]).all(-1)  # (B, N)
        assert not is_finite[1, 2] and is_finite.sum() == 3 * 5 - 1


@pytest.mark.parametrize("op", FILE)
def test_no_samples(op, device):
    found = RowJvp(op, b=0, n=5, d=40, device=device).by_kernel()
    assert all(t.shape[:2] == (0, 5) for t in found.values())
