"""Errors planted in the kernels, each of which the numerical contract must catch."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from contract import compare  # noqa: E402
from ops.row_ops import Case  # noqa: E402

from ditfast import kernels  # noqa: E402

LN, GATED, JUNCTION = "layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate"
FILE = {LN: "layer_norm_modulate", GATED: "gated_residual", JUNCTION: "junction"}
FOLDER = Path(kernels.__file__).parent


@dataclass
class Shaped(Case):
    """Three samples of two chunks, the second of which is not full, of rows that do not fill their block."""

    dtype: str = "mixed"
    b: int = 3
    n: int = 6
    d: int = 40
    mean: float = 0.0
    spread: float = 1.0

    def inputs(self, dtype=None):
        x, *rest = super().inputs(dtype)
        with torch.no_grad():
            x.mul_(self.spread).add_(self.mean)
        return [x, *rest]


@dataclass
class Planted:
    op: str
    file: str  # in kernels/
    where: str  # the function
    right: str
    wrong: str
    what: str
    case: dict

    def __str__(self):
        return f"{self.op}-{self.where}-{self.what}".replace(" ", "_")


def plant(where, right, wrong, what, ops=(LN, GATED, JUNCTION), file=None, **case):
    return [Planted(op, file or FILE[op], where, right, wrong, what, case) for op in ops]


WITH_LN, WITH_GATE = (LN, JUNCTION), (GATED, JUNCTION)
FORWARD, BACKWARD = "forward_kernel", "backward_kernel"
LAST_TOKEN = "tl.minimum(first + chunk, N)"

PLANTED = [
    # LayerNorm
    *plant("layer_norm_grad", "g - c1 - xhat", "g - xhat", "mean term dropped", WITH_LN, "rows"),
    *plant("layer_norm_grad", " - xhat * c2", "", "xhat term dropped", WITH_LN, "rows"),
    *plant("layer_norm_grad", "g = dh * scale1", "g = dh", "scale not applied", WITH_LN, "rows"),
    *plant("layer_norm_grad", "rstd * (g", "(g", "rstd not applied", WITH_LN, "rows"),
    *plant("normalize", "tl.where(mask, x - mean, 0.0)", "x - mean", "tail counted", WITH_LN, "rows", mean=1.0),
    *plant("normalize", " + tl.cast(eps, tl.float32)", "", "eps dropped", (LN,), "rows", spread=1e-3),
    *plant(
        "normalize",
        "tl.sum(centred * centred, 0) / D",
        "tl.sum(x * x, 0) / D - mean * mean",
        "one-pass variance",
        (LN,),
        "rows",
        mean=100.0,
        dtype="fp32",
    ),
    *plant(FORWARD, "1.0 + load_row(scale", "load_row(scale", "one plus dropped", WITH_LN),
    *plant(BACKWARD, "1.0 + load_row(scale", "load_row(scale", "one plus dropped", WITH_LN),
    *plant(FORWARD, "+ shift_row", "", "shift dropped", WITH_LN),
    *plant(BACKWARD, "dscale += dh_row * xhat", "dscale += dh_row * x_row", "dscale of x", WITH_LN),
    # rows of the wrong sample
    *plant(FORWARD, "shift + b * shift_b", "shift", "shift of sample 0", WITH_LN),
    *plant(FORWARD, "scale + b * scale_b", "scale", "scale of sample 0", WITH_LN),
    *plant(BACKWARD, "scale + b * scale_b", "scale", "scale of sample 0", WITH_LN),
    *plant(FORWARD, "gate + b * gate_b", "gate", "gate of sample 0", WITH_GATE),
    *plant(BACKWARD, "gate + b * gate_b", "gate", "gate of sample 0", WITH_GATE),
    *plant(FORWARD, "x + b * x_b + n * x_n", "x + (b * N + n) * D", "strides of x ignored", layout="strided"),
    *plant(
        FORWARD, "y + b * y_b + n * y_n", "y + (b * N + n) * D", "strides of y ignored", WITH_GATE, layout="strided"
    ),
    *plant(
        "unit_stride",
        "t if t.stride(-1) == 1 else t.contiguous()",
        "t",
        "last stride ignored",
        file="rows",
        layout="permuted",
    ),
    # what is not reached
    *plant(FORWARD, LAST_TOKEN, "tl.minimum(first + chunk, N - 1)", "last token missed"),
    *plant(BACKWARD, LAST_TOKEN, "tl.minimum(first + chunk, N - 1)", "last token missed"),
    *plant(FORWARD, LAST_TOKEN, "tl.minimum(first + chunk - 1, N)", "last token of a chunk missed"),
    *plant(BACKWARD, LAST_TOKEN, "tl.minimum(first + chunk - 1, N)", "last token of a chunk missed"),
    *plant(FORWARD, "mask = cols < D", "mask = cols < D - 1", "last column missed"),
    *plant(BACKWARD, "mask = cols < D", "mask = cols < D - 1", "last column missed"),
    *plant("_options", "next_power_of_2(d)", "next_power_of_2(d) // 2", "block too small", file="rows"),
    # sums over chunks and samples
    *plant("_sum_partials_kernel", "(rows < count)", "(rows < count - 1)", "last partial missed", file="rows"),
    *plant(
        "_sum_partials_kernel",
        "range(0, count, COUNT)",
        "range(0, 1)",
        "later rounds missed",
        (GATED,),
        "rows",
        n=300,
        b=1,
        d=8,
    ),
    *plant("_sum_partials_kernel", "outer * stride", "0 * stride", "partials of sample 0", file="rows"),
    *plant("_sum_partials_kernel", "mask=cols < D", "mask=cols < D - 1", "last column missed", file="rows"),
    # the gate
    *plant(
        BACKWARD,
        "if HAS_BIAS:\n            y_row += load_row(bias, cols, mask)",
        "if HAS_BIAS:\n            pass",
        "dgate without the bias",
        (GATED,),
    ),
    *plant(BACKWARD, "            y_row += load_row(bias, cols, mask)\n", "", "dgate without the bias", (JUNCTION,)),
    *plant("backward", "partial[1].reshape(1, b * chunks, d)", "partial[1][:1]", "dbias of sample 0", (GATED,)),
    *plant("backward", "partial[3].reshape(1, b * chunks, d)", "partial[3][:1]", "dbias of sample 0", (JUNCTION,)),
    *plant(BACKWARD, "dx_sum * gate_row", "dx_sum", "dbias without the gate", (JUNCTION,)),
    *plant(BACKWARD, "dgate += dout_row * y_row", "dgate += dy_row * y_row", "dgate with the gate", (GATED,)),
    *plant(FORWARD, "y_row += load_row(bias, cols, mask)", "pass", "bias dropped", WITH_GATE),
    # the junction
    *plant(
        FORWARD, "normalize(x_row,", "normalize(load_row(x + b * x_b + n * x_n, cols, mask),", "LN of x", (JUNCTION,)
    ),
    *plant(BACKWARD, "dx_row += layer_norm_grad", "dx_row = layer_norm_grad", "dx_new not added", (JUNCTION,)),
    *plant(BACKWARD, "dx_row += layer_norm_grad(dh_row, xhat, scale_row, r, D)\n", "\n", "dh ignored", (JUNCTION,)),
]


def changed(source, where, right, wrong):
    """``source`` with one text replaced in one function, where it must occur once."""
    head, start, rest = source.partition(f"\ndef {where}(")
    body, end, tail = rest.partition("\n\n\n")
    assert start and body.count(right) == 1, f"{right!r} does not occur once in {where}"
    return head + start + body.replace(right, wrong) + end + tail


def load(name, source, folder, monkeypatch):
    """Let ``ditfast.kernels.<name>`` be this source until the test ends."""
    path, full = folder / f"{name}.py", f"ditfast.kernels.{name}"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(full, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, full, module)
    monkeypatch.setattr(kernels, name, module, raising=False)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def swap(tmp_path, monkeypatch, poisoned):
    """Replace a kernel's file, and the one that it shares with others, by a copy with one change."""

    def swap(planted, wrong):
        for name in ("rows", FILE[planted.op]):
            source = (FOLDER / f"{name}.py").read_text()
            if name == planted.file:
                source = changed(source, planted.where, planted.right, wrong)
            module = load(name, source, tmp_path, monkeypatch)
            if name == "rows":
                monkeypatch.setattr(module, "_chunk_size", lambda *_, **__: 4)

    return swap


def check(case):
    compare(case.call, case.inputs, names=case.names(), weights=case.weights(), backend="triton")


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_planted_error_is_caught(planted, swap):
    swap(planted, planted.wrong)
    with pytest.raises(AssertionError, match="max error|relative L2 error|not finite"):
        check(Shaped(planted.op, **planted.case))


UNCHANGED = {(p.op, *p.case.items()): p for p in PLANTED}


@pytest.mark.parametrize("planted", UNCHANGED.values(), ids=lambda p: f"{p.op}-{p.case}")
def test_right_kernel_passes(planted, swap):
    """The same harness without an error: what the tests above see is the error."""
    swap(planted, planted.right)
    check(Shaped(planted.op, **planted.case))
