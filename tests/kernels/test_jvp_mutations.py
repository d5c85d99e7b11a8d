"""Errors planted in the kernels that compute tangents; the numerical contract must catch each."""

from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from attention_cases import sample  # noqa: E402
from contract import assert_contract  # noqa: E402
from ops.row_jvps import FILE, GATED, JUNCTION, LN, RowJvp  # noqa: E402
from planting import CAUGHT, Planted, plant_in, unchanged  # noqa: E402

from ditfast.ops import reference  # noqa: E402

# in the interpreter, GELU's exp(large) is numpy's, which warns
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

MLP, ATTENTION = "mlp", "attention"
FILES = {
    **{op: ("strides", "rows", "sums", file) for op, file in FILE.items()},
    MLP: ("strides", "gelu"),
    ATTENTION: ("attention_jvp",),
}


def plant(right, wrong, what, ops=tuple(FILE), file=None, where="jvp_kernel", **case):
    """One error, for every operation that must reveal it; ``case`` changes the inputs."""
    return [Planted(op, file or FILES[op][-1], where, right, wrong, what, case) for op in ops]


WITH_LN, WITH_GATE, TANGENT = (LN, JUNCTION), (GATED, JUNCTION), "layer_norm_tangent"
ROW, Y_ROW = "b * x_t_b + n * x_t_n", "b * y_t_b + n * y_t_n"

PLANTED = [
    # LayerNorm
    *plant("x_t0, x_t1 = x_t0 - c1, x_t1 - c1", "pass", "mean kept", WITH_LN, "rows", TANGENT),
    *plant("(x_t0 - xhat0 * c2)", "x_t0", "projection on xhat dropped", WITH_LN, "rows", TANGENT),
    *plant("(x_t1 - xhat1 * c2)", "x_t1", "projection of the tail dropped", WITH_LN, "rows", TANGENT, d=48),
    *plant("return rstd * (x_t0", "return (x_t0", "rstd not applied", WITH_LN, "rows", TANGENT),
    *plant("x0 * scale_t0", "0.0", "scale_t forgotten", WITH_LN),
    *plant("x1 * scale_t1", "0.0", "scale_t of the tail forgotten", WITH_LN, d=48),
    *plant(" + shift_t0", "", "shift_t forgotten", WITH_LN),
    *plant(" + shift_t1", "", "shift_t of the tail forgotten", WITH_LN, d=48),
    *plant("x_t0 * scale0", "x_t0", "scale not applied to the tangent", WITH_LN),
    # the gate and the bias
    *plant(" + gate_t0 * y0", "", "gate_t forgotten", WITH_GATE),
    *plant(" + gate_t1 * y1", "", "gate_t of the tail forgotten", WITH_GATE, d=48),
    *plant("gate0 * y_t0", "y_t0", "gate not applied to y_t", WITH_GATE),
    *plant("y_t0 + bias_t0", "y_t0", "bias_t forgotten", WITH_GATE),
    *plant("x_t0, x_t1 = x_t0 + gate0", "x_t0, x_t1 = gate0", "x_t forgotten", WITH_GATE),
    *plant("y0, y1, y_t0, y_t1 = y0 + bias0,", "y0, y1, y_t0, y_t1 = y0,", "bias dropped", WITH_GATE),
    # another row
    *plant(ROW, "n * x_t_n", "x_t of sample 0"),
    *plant(ROW, "b * x_t_b", "x_t of token 0"),
    *plant(ROW, "b * x_b + n * x_n", "x_t at the strides of x", tangent_layout="strided"),
    *plant(Y_ROW, "n * y_t_n", "y_t of sample 0", WITH_GATE),
    *plant(Y_ROW, "b * y_b + n * y_n", "y_t at the strides of y", WITH_GATE, tangent_layout="strided"),
    *plant("b * gate_t_b", "0", "gate_t of sample 0", WITH_GATE),
    *plant("b * shift_t_b", "0", "shift_t of sample 0", WITH_LN),
    *plant("b * scale_t_b", "0", "scale_t of sample 0", WITH_LN),
    *plant("b * scale_t_b", "b * scale_b", "scale_t at the stride of scale", WITH_LN, tangent_layout="strided"),
    *plant("tl.minimum(first + chunk, N)", "tl.minimum(first + chunk, N - 1)", "last token missed"),
    # GELU
    *plant("x_t * derivative", "x_t * sigmoid", "slope dropped", (MLP,)),
    *plant("(x * sigmoid)", "x", "activation not applied", (MLP,)),
    *plant("rows[:, None] * pre_t_m", "rows[:, None] * pre_m", "pre_t at the stride of pre", (MLP,)),
    *plant("(rows < M)", "(rows < M - 1)", "last row missed", (MLP,)),
    *plant("program % blocks * COLS", "0 * COLS", "later columns missed", (MLP,)),
    # attention
    *plant(" - drift * o0", "", "sum p s' dropped", (ATTENTION,), d=64),
    *plant(" - drift * o1", "", "sum p s' dropped from the tail", (ATTENTION,)),
    *plant("drift * shrink", "drift", "sum p s' not scaled down", (ATTENTION,), d=64),
    *plant("o_t0 * shrink[:, None]", "o_t0", "tangent not scaled down", (ATTENTION,), d=64),
    *plant("o_t1 * shrink[:, None]", "o_t1", "tangent of the tail not scaled down", (ATTENTION,)),
    *plant("(first == 0, moment", "(first >= 0, moment", "a new center in each tile", (ATTENTION,), d=64),
    *plant("(s_t * scale - ", "(s_t - ", "scale forgotten", (ATTENTION,), d=64),
    *plant("s_t += dot(q0, tl.trans(", "s_t += dot(q_t0, tl.trans(", "second derivative", (ATTENTION,), d=64),
    *plant("s_t += dot(q_t1, k1, UPCAST)", "pass", "q_t of the tail forgotten", (ATTENTION,)),
    *plant("s_t += dot(q1, tl.trans(", "s_t += 0 * dot(q1, tl.trans(", "k_t of the tail forgotten", (ATTENTION,)),
    *plant("o_t0 += dot(p, ", "o_t0 += 0 * dot(p, ", "v_t forgotten", (ATTENTION,), d=64),
    *plant("o_t1 += dot(p, ", "o_t1 += 0 * dot(p, ", "v_t of the tail forgotten", (ATTENTION,)),
    *plant("qkv_t + b * qkv_t_b", "qkv_t", "tangent of sample 0", (ATTENTION,), d=64),
    *plant("qkv_t_b + h * D", "qkv_t_b", "tangent of head 0", (ATTENTION,), d=64, heads=2),
    *plant("(keys < N)", "(keys <= N)", "a key past the last", (ATTENTION,), d=64),
]


@pytest.fixture
def swap(tmp_path, monkeypatch, poisoned):
    return lambda planted, wrong: plant_in(FILES[planted.op], planted, wrong, tmp_path, monkeypatch)


def check(planted):
    {MLP: check_gelu, ATTENTION: check_attention}.get(planted.op, check_rows)(planted)


def check_rows(planted):
    """Two samples of two chunks, the second one partial."""
    RowJvp(planted.op, **{"dtype": "mixed", "b": 2, "n": 6, "d": 40} | planted.case).assert_right()


def check_gelu(_):
    """A tangent whose rows have 8 more columns; two blocks of rows and two of columns, the last ones partial."""
    from ditfast.kernels import gelu

    g = torch.Generator().manual_seed(3)
    pre, pre_t = torch.randn(6, 520, generator=g) * 3, torch.randn(6, 528, generator=g)[:, :520]
    hold(gelu.jvp, partial(torch.nn.functional.gelu, approximate="tanh"), pre, pre_t, outputs=(0, 1))


def check_attention(planted):
    """Two samples; three tiles of keys, the last one partial."""
    from ditfast.kernels import attention_jvp

    d, heads = ({"d": 72, "heads": 1} | planted.case).values()
    qkv, qkv_t = (sample(2, 69, heads, d, torch.float16, seed=seed)[0] for seed in (0, 1))
    plain = partial(reference.attention, num_heads=heads)
    hold(lambda *a: attention_jvp.jvp(*a, heads, d**-0.5), plain, qkv, qkv_t, outputs=(0, 2))


def hold(kernel, fn, x, x_t, outputs):
    """The kernel's outputs and tangents that correspond to fn's meet the contract."""
    found = kernel(x, x_t)
    low, ref = (torch.func.jvp(fn, (x.to(dtype),), (x_t.to(dtype),)) for dtype in (x.dtype, torch.float64))
    for i, name, lo, r in zip(outputs, ("output", "tangent"), low, ref, strict=True):
        assert_contract(name, found[i], lo, r)


@pytest.mark.parametrize("planted", PLANTED, ids=str)
def test_planted_error_is_caught(planted, swap):
    swap(planted, planted.wrong)
    with pytest.raises(AssertionError, match=CAUGHT):
        check(planted)


@pytest.mark.parametrize("planted", unchanged(PLANTED), ids=lambda p: f"{p.op}-{p.case}")
def test_a_correct_kernel_passes(planted, swap):
    """The same harness without an error: so the tests above detect the error itself."""
    swap(planted, planted.right)
    check(planted)
