"""layer_norm_modulate, gated_residual and the junction meet the numerical contract on Triton."""

import sys

import pytest
import torch
from contract import compare, run
from ops.row_ops import INPUTS, LAYOUTS, OUTPUTS, Case
from pairwise import pairwise

from ditfast import ops

hypothesis = pytest.importorskip("hypothesis")
given, settings, st = hypothesis.given, hypothesis.settings, hypothesis.strategies

AXES = {
    "dtype": ("fp32", "fp16", "bf16", "mixed"),
    "b": (0, 1, 3),
    "n": (1, 7, 64, 77, 256, 257),
    "d": (8, 96, 384, 768, 1024, 1152, 1536, 4096),
    "layout": LAYOUTS,
    "bias": (True, False),
    "chunk": (1, 4, 32),
}


def cost(c):
    return c["b"] * c["n"] * (c["d"] + 1000)


CASES = [
    {"op": op, **case}
    for op in INPUTS
    for case in pairwise(cost, **AXES)
    if op != "layer_norm_modulate" or case["bias"]
]


def check(case, backend="triton"):
    return compare(case.call, case.inputs, names=case.names(), weights=case.weights(), backend=backend)


@pytest.fixture
def chunked(monkeypatch):
    """Set the tokens per program, which launchers derive from the problem's size."""
    from ditfast.kernels import rows

    return lambda chunk: monkeypatch.setattr(rows, "_chunk_size", lambda *_, **__: chunk)


def label(c):
    bias = "bias" if c["bias"] else "nobias"
    return f"{c['op']}-{c['dtype']}-{c['b']}x{c['n']}x{c['d']}-{c['layout']}-{bias}-chunk{c['chunk']}"


@pytest.mark.parametrize("c", CASES, ids=label)
def test_contract(c, device, poisoned, chunked):
    chunked(c["chunk"])
    check(Case(**{k: v for k, v in c.items() if k != "chunk"}, device=device))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    op=st.sampled_from(list(INPUTS)),
    dtype=st.sampled_from(AXES["dtype"]),
    b=st.integers(1, 4),
    n=st.integers(1, 40),
    d=st.integers(1, 40).map(lambda k: 8 * k),
    layout=st.sampled_from(LAYOUTS),
    bias=st.booleans(),
)
def test_contract_of_any_shape(op, dtype, b, n, d, layout, bias):
    check(Case(op, dtype, b, n, d, layout, bias, "cuda" if torch.cuda.is_available() else "cpu"))


@pytest.mark.parametrize("op", INPUTS)
def test_repeats_are_bit_equal(op, device, chunked):
    chunked(4)
    case = Case(op, "mixed", b=2, n=33, d=96, device=device)
    first, second = (run(lambda *a: case.call(*a, backend="triton"), case.inputs(), case.weights()) for _ in range(2))
    for name, a, b in zip(case.names(), first, second, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
def test_formulas_meet_the_contract(op, dtype, monkeypatch):
    """These run inside the operation if an expected kernel is not used."""
    case = Case(op, dtype, b=3, n=7, d=96)
    monkeypatch.setattr(sys.modules[getattr(ops, op).__module__], "resolve", lambda *_: "reference")
    check(case, backend="triton")


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_nan_and_inf_propagate(op, value, device):
    case = Case(op, n=5, d=32, device=device)
    for backend in ("reference", "triton"):
        inputs = case.inputs()
        with torch.no_grad():
            inputs[0][1, 2, 3] = value
        out = case.call(*inputs, backend=backend)
        for t in out if isinstance(out, tuple) else (out,):
            assert not torch.isfinite(t[1, 2, 3])
            assert torch.isfinite(t[0]).all() and torch.isfinite(t[2]).all()


@pytest.mark.parametrize("op", INPUTS)
def test_strides_beyond_int32(op):
    """A sample stride of more than 2**31 elements: only touched pages are ever mapped."""
    case = Case(op, "fp16", b=2, n=3, d=32)
    inputs = case.inputs()
    stride = 2**31 + 64
    storage = torch.empty(stride + 3 * 32, dtype=torch.float16)
    far = storage.as_strided((2, 3, 32), (stride, 32, 1))
    with torch.no_grad():
        far.copy_(inputs[0])
    expected = case.call(*inputs, backend="triton")
    got = case.call(far, *inputs[1:], backend="triton")
    expected, got = (o[0] if isinstance(o, tuple) else o for o in (expected, got))
    assert torch.equal(expected, got)


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("layout", ("dense", "strided", "permuted"))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize("requires_grad", (True, False))
def test_opcheck(op, layout, dtype, requires_grad):
    case = Case(op, dtype, b=2, n=3, d=16, layout=layout)
    inputs = [t.requires_grad_(requires_grad) for t in case.inputs()]
    schema = getattr(torch.ops.ditfast, op).default
    named = dict(zip(INPUTS[op], inputs, strict=True)) | {
        "eps": 1e-6, "out_dtype": inputs[0].dtype, "backend": "triton"
    }  # fmt: skip
    args = [named[a.name] for a in schema._schema.arguments]
    torch.library.opcheck(schema, args)


@pytest.mark.parametrize("op", INPUTS)
def test_compiles_fullgraph(op):
    """Forward and backward inside torch.compile equal eager, even as N and B change."""
    fn = torch.compile(lambda case, *a: case.call(*a, backend="triton"), fullgraph=True, backend="aot_eager")
    for b, n in ((2, 5), (3, 7), (4, 6)):
        case = Case(op, "mixed", b=b, n=n, d=32, layout="strided")
        eager = run(lambda *a, c=case: c.call(*a, backend="triton"), case.inputs(), case.weights())
        compiled = run(lambda *a, c=case: fn(c, *a), case.inputs(), case.weights())
        for name, e, c in zip(case.names(), eager, compiled, strict=True):
            assert torch.equal(e, c), name


@pytest.mark.parametrize("op", INPUTS)
def test_unused_output_gets_zeros_as_gradient(op):
    """The gradient of the first output alone; PyTorch fills in zeros for the other's."""
    case = Case(op, n=5, d=32)
    grads = []
    for backend in ("reference", "triton"):
        inputs = case.inputs()
        out = case.call(*inputs, backend=backend)
        out = out[0] if isinstance(out, tuple) else out
        grads.append(torch.autograd.grad(out.square().sum(), inputs, allow_unused=True))
    for name, a, b in zip(INPUTS[op], *grads, strict=True):
        zero = a is None or not a.any()
        assert (b is None or not b.any()) if zero else torch.allclose(a, b, rtol=1e-4, atol=1e-4), name


def test_names_cover_every_gradient():
    for op in INPUTS:
        assert len(Case(op).names()) == len(OUTPUTS[op]) + len(INPUTS[op])


@pytest.mark.parametrize("op", INPUTS)
def test_batched_gradients(op, device):
    """As `torch.autograd.functional.jacobian` uses them: backward sees tensors without their own memory."""
    case = Case(op, b=2, n=3, d=16, device=device)
    results = []
    for backend in ("reference", "triton"):
        inputs = case.inputs()
        out = case.call(*inputs, backend=backend)
        out = out[-1] if isinstance(out, tuple) else out
        directions = torch.randn(4, *out.shape, generator=torch.Generator().manual_seed(2)).to(out)
        wanted = [t for t in inputs if t is not None]
        results.append(torch.autograd.grad(out, wanted, directions, is_grads_batched=True, allow_unused=True))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
