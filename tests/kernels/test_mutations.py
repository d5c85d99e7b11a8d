"""Errors planted in the kernels; the numerical contract must catch each."""

from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from contract import compare  # noqa: E402
from ops.row_ops import Case  # noqa: E402
from planting import CAUGHT, Planted, plant_in, unchanged  # noqa: E402

from ditfast import ops as operations  # noqa: E402

LN, GATED, JUNCTION = "layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate"
PATCHES = ("patchify", "unpatchify", "patch_embed")
FILE = {LN: LN, GATED: GATED, JUNCTION: "junction", "mlp": "gelu", **dict.fromkeys(PATCHES, "patches")}


@dataclass
class Shaped(Case):
    """Three samples of two chunks, the second one partial, with rows that do not fill their block."""

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


def plant(where, right, wrong, what, ops=(LN, GATED, JUNCTION), file=None, **case):
    """One error, for every operation that must reveal it; ``case`` changes the inputs of `Shaped`."""
    return [Planted(op, file or FILE[op], where, right, wrong, what, case) for op in ops]


WITH_LN, WITH_GATE = (LN, JUNCTION), (GATED, JUNCTION)
FORWARD, BACKWARD = "forward_kernel", "backward_kernel"
MLP = ("mlp",)
LAST_TOKEN = "tl.minimum(first + chunk, N)"
ADD_ONE = "    scale0, scale1 = 1.0 + scale0, 1.0 + scale1\n"

PLANTED = [
    # LayerNorm
    *plant("layer_norm_grad", "(g0 - c1 - xhat0", "(g0 - xhat0", "mean term dropped", WITH_LN, "rows"),
    *plant("layer_norm_grad", "g1 - c1 - xhat1 * c2", "g1 - c1", "xhat of the tail dropped", WITH_LN, "rows", d=48),
    *plant("layer_norm_grad", "g0, g1 = dh0 * scale0,", "g0, g1 = dh0,", "scale not applied", WITH_LN, "rows"),
    *plant("layer_norm_grad", "rstd * (g1", "(g1", "rstd not applied to the tail", WITH_LN, "rows", d=48),
    *plant("centre_piece", "piece = tl.where(", "_ = tl.where(", "tail counted", WITH_LN, "rows", mean=1.0),
    *plant("normalize", " + tl.cast(eps, tl.float32)", "", "eps dropped", (LN,), "rows", spread=1e-3),
    *plant(
        "normalize",
        "x0, x1 = centre(x0, x1, mean, D, MAIN, TAIL)\n    variance = total(x0 * x0, x1 * x1, TAIL) / D",
        "variance = total(x0 * x0, x1 * x1, TAIL) / D - mean * mean\n"
        "    x0, x1 = centre(x0, x1, mean, D, MAIN, TAIL)",
        "one-pass variance",
        (LN,),
        "rows",
        mean=100.0,
        dtype="fp32",
    ),
    *plant("total", "result += tl.sum(x1, 0)", "pass", "tail not summed", WITH_LN, "rows", d=48),
    *plant(FORWARD, ADD_ONE, "", "one plus dropped", WITH_LN),
    *plant(BACKWARD, ADD_ONE, "", "one plus dropped", WITH_LN),
    *plant(FORWARD, "scale0 + shift0,", "scale0,", "shift dropped", WITH_LN),
    *plant(FORWARD, "scale1 + shift1,", "scale1,", "shift of the tail dropped", WITH_LN, d=48),
    *plant(BACKWARD, "dscale0 + dh0 * xhat0", "dscale0 + dh0 * x0", "dscale of x", WITH_LN),
    *plant(BACKWARD, "dscale1 + dh1 * xhat1", "dscale1", "dscale of the tail dropped", WITH_LN, d=48),
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
        "t if t is None or t.stride(-1) == 1 else t.contiguous()",
        "t",
        "last stride ignored",
        file="strides",
        layout="permuted",
    ),
    # what is not reached
    *plant(FORWARD, LAST_TOKEN, "tl.minimum(first + chunk, N - 1)", "last token missed"),
    *plant(BACKWARD, LAST_TOKEN, "tl.minimum(first + chunk, N - 1)", "last token missed"),
    *plant(FORWARD, LAST_TOKEN, "tl.minimum(first + chunk - 1, N)", "last token of a chunk missed"),
    *plant(BACKWARD, LAST_TOKEN, "tl.minimum(first + chunk - 1, N)", "last token of a chunk missed"),
    *plant("load_piece", "mask=cols < D", "mask=cols < D - 1", "last column not loaded", file="rows"),
    *plant("store_piece", "mask=cols < D", "mask=cols < D - 1", "last column not stored", file="rows"),
    *plant("load_row", "load_piece(at, MAIN, TAIL, D)", "load_piece(at, 0, TAIL, D)", "tail", file="rows", d=48),
    *plant("store_row", "store_piece(at, x1, MAIN, TAIL, D)", "pass", "tail not stored", file="rows", d=48),
    *plant("_masked", "next_power_of_2(d)", "next_power_of_2(d) // 2", "block too small", file="rows"),
    # sums over chunks and samples
    *plant("sum_rows", "(rows < count)", "(rows < count - 1)", "last partial missed", file="sums"),
    *plant(
        "sum_rows", "range(0, count, ROWS)", "range(0, 1)", "later rounds missed", (GATED,), "sums", n=300, b=1, d=8
    ),
    *plant("sum_rows", "mask=cols < D", "mask=cols < D - 1", "last column missed", file="sums"),
    *plant("sum_rows", "block * COLS", "0 * COLS", "later blocks missed", (LN,), "sums", d=136),
    *plant("sum_partials_kernel", "partial + group * chunks * D", "partial", "partials of sample 0", file="sums"),
    *plant("sum_partials_kernel", "samples * chunks, D", "chunks, D", "dbias of sample 0", WITH_GATE, "sums"),
    # the gate and the bias
    *plant(BACKWARD, "dgate0 + bias0 * sum0", "dgate0", "dgate without the bias", WITH_GATE),
    *plant(BACKWARD, "dgate1 + bias1 * sum1", "dgate1", "dgate of the tail without the bias", WITH_GATE, d=48),
    *plant(BACKWARD, "sum0 * gate0", "sum0", "dbias without the gate", WITH_GATE),
    *plant(BACKWARD, "dgate0 + dout0 * y0", "dgate0 + dout0 * gate0 * y0", "dgate with the gate", (GATED,)),
    *plant(FORWARD, "(y0 + bias0)", "y0", "bias dropped", WITH_GATE),
    *plant(FORWARD, "(y1 + bias1)", "y1", "bias of the tail dropped", WITH_GATE, d=48),
    # the junction
    *plant(FORWARD, "normalize(x0, x1,", "normalize(y0, y1,", "LN of y", (JUNCTION,)),
    *plant(BACKWARD, "dx0 + through0", "through0", "dx_new not added", (JUNCTION,)),
    *plant(BACKWARD, "dx0 + through0", "dx0", "dh ignored", (JUNCTION,)),
    *plant(BACKWARD, "dx1 + through1", "dx1", "dh of the tail ignored", (JUNCTION,), d=48),
    # the MLP
    *plant("sigmoid_and_derivative", " * (1.0 + rest * tl.clamp(steep, -STEEP, STEEP))", "", "slope dropped", MLP),
    *plant("sigmoid_and_derivative", "CUBIC_OF_SLOPE", "CUBIC", "cubic term of the slope", MLP),
    *plant(BACKWARD, "total += dpre", "total += dgelu", "dbias after GELU", MLP),
    *plant(BACKWARD, "(x * sigmoid).to", "x.to", "activation not applied again", MLP),
    *plant(BACKWARD, "(rows < M)", "(rows < M - 1)", "last row missed", MLP),
    *plant(BACKWARD, "first + CHUNK, ROWS", "first + CHUNK - ROWS, ROWS", "last rows of a chunk missed", MLP),
    *plant(BACKWARD, "(cols < F)[None, :]", "(cols < F - 1)[None, :]", "last column missed", MLP),
    *plant(BACKWARD, "program % blocks * COLS", "0 * COLS", "later columns missed", MLP),
    # patches
    *plant("element", "j // (C * P), j // C % P", "j // C % P, j // (C * P)", "patch transposed", PATCHES[:1]),
    *plant("element", "j // P % P, j % P", "j % P, j // P % P", "patch transposed", PATCHES[2:]),
    *plant("patchify_kernel", "mask = at < total", "mask = at < total - 1", "last element missed", PATCHES[:1]),
    *plant("patchify_kernel", "b * x_b", "0 * x_b", "image of sample 0", PATCHES[:1]),
    *plant("unpatchify_kernel", "mask = at < total", "mask = at < total - 1", "last element missed", PATCHES[1:2]),
    *plant("unpatchify_kernel", "b * tokens_b", "0 * tokens_b", "tokens of sample 0", PATCHES[1:2]),
    *plant("unpatchify_kernel", "h // P * (width // P)", "h // P * (height // P)", "square grid", PATCHES[1:2]),
    *plant("unpatchify_kernel", "(h % P * P + w % P) * C", "(w % P * P + h % P) * C", "transposed", PATCHES[1:2]),
    *plant("embed_kernel", "x + b * x_b", "x", "image of sample 0", PATCHES[2:]),
    *plant("embed_kernel", "0, K, BLOCK_K", "0, BLOCK_K, BLOCK_K", "later part of a patch missed", PATCHES[2:]),
    *plant("embed_kernel", "(k < K)[None, :]", "(k < K - 1)[None, :]", "last element missed", PATCHES[2:]),
    *plant("embed_kernel", "tl.load(bias + d, mask=d_live", "tl.load(bias + d, mask=d < 0", "bias", PATCHES[2:]),
    *plant("embed_kernel", "pos + n[:, None] * pos_n", "pos + n[:, None] * 0", "position of token 0", PATCHES[2:]),
    *plant("embed_kernel", "n < N, d < D", "n < N - 1, d < D", "last token missed", PATCHES[2:]),
    *plant("embed_kernel", "n < N, d < D", "n < N, d < D - 1", "last column missed", PATCHES[2:]),
]


@pytest.fixture
def swap(tmp_path, monkeypatch, poisoned):
    """Replace a kernel's file, and those it shares with others, with copies, one of which is changed."""

    def swap(planted, wrong):
        plant_in(("strides", "rows", "sums", FILE[planted.op]), planted, wrong, tmp_path, monkeypatch)

    return swap


def check(planted):
    """Check the operation against the numerical contract."""
    {"mlp": check_mlp, **dict.fromkeys(PATCHES, check_patches)}.get(planted.op, check_rows)(planted)


def check_rows(planted):
    case = Shaped(planted.op, **planted.case)
    compare(case.call, case.inputs, names=case.names(), weights=case.weights(), backend="triton")


def check_mlp(planted):
    """Two chunks of rows and two blocks of columns, the last ones partial."""
    b, n, d, f = 2, 11, 16, 520
    shapes = {"h": (b, n, d), "w1": (f, d), "b1": (f,), "w2": (d, f), "b2": (d,)}
    spreads = (3.0, d**-0.5, 0.5, f**-0.5, 0.5)  # GELU's bend and both its tails

    def inputs(dtype):
        g = torch.Generator().manual_seed(3)
        values = (torch.randn(s, generator=g) * k for s, k in zip(shapes.values(), spreads, strict=True))
        return [t.half().to(dtype or torch.float16).requires_grad_() for t in values]

    gradients = [f"d{name}" for name in shapes]
    compare(
        lambda *a, backend: operations.mlp(*a, recompute=True, backend=backend),
        inputs,
        names=("y", *gradients),
        parameters=gradients[1:],
        weights=[torch.randn(b, n, d, generator=torch.Generator().manual_seed(4)).half()],
        backend="triton",
    )


def check_patches(planted):
    """Images (2, 4, 12, 20) in patches of 4 pixels, in the order (ph, pw, c) if there is a choice; 15 tokens."""
    image, tokens = (2, 4, 12, 20), (2, 15, 64)
    shapes = {"patchify": [image], "unpatchify": [tokens], "patch_embed": [image, (136, 4, 4, 4), (136,), (15, 136)]}
    rest = {"patchify": (4, True), "unpatchify": (4, (3, 5), True), "patch_embed": (4,)}[planted.op]
    outputs = {"patchify": tokens, "unpatchify": image, "patch_embed": (2, 15, 136)}

    def randn(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(5))

    compare(
        lambda *a, backend: getattr(operations, planted.op)(*a, *rest, backend=backend),
        lambda dtype: [randn(*shape).to(dtype or torch.float32).requires_grad_() for shape in shapes[planted.op]],
        names=("out", "dx", "dweight", "dbias", "dpos")[: 1 + len(shapes[planted.op])],
        parameters=("dweight", "dbias", "dpos"),
        weights=[randn(*outputs[planted.op])],
        backend="triton",
    )


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
