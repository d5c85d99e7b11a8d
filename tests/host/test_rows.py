"""layer_norm_modulate, gated_residual and the junction in C++ on the CPU meet the numerical contract."""

import pytest
import torch
from contract import compare, run
from ops.row_ops import DTYPES, INPUTS, LAYOUTS, OUTPUTS, Case
from pairwise import pairwise

from ditfast import ops
from ditfast.ops import host

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = float("nan"), float("inf")
SHAPES = (  # B, N, D: less than a vector, several and a remainder; one chunk of rows, several and a remainder
    (1, 1, 8),
    (3, 5, 24),
    (0, 5, 40),
    (2, 0, 16),
    (2, 77, 72),
    (3, 33, 384),
    (2, 600, 8),
    (1, 40, 1160),
)
AXES = {"dtype": tuple(DTYPES), "shape": SHAPES, "layout": LAYOUTS, "bias": (True, False)}
CASES = [
    Case(op, c["dtype"], *c["shape"], c["layout"], c["bias"])
    for op in INPUTS
    for c in pairwise(lambda c: 0, **AXES)
    if op != "layer_norm_modulate" or c["bias"]
]


def label(c):
    return f"{c.op}-{c.dtype}-{c.b}x{c.n}x{c.d}-{c.layout}-{'bias' if c.bias else 'nobias'}"


def results(case, backend="host"):
    return run(lambda *a: case.call(*a, backend=backend), case.inputs(), case.weights())


def check(case):
    compare(case.call, case.inputs, names=case.names(), weights=case.weights(), backend="host")


@pytest.mark.parametrize("case", CASES, ids=label)
def test_contract(case, poisoned):
    check(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", INPUTS)
def test_contract_in_every_instruction_set(op, dtype, isa, poisoned):
    """Rows of less than a vector, and of several and a remainder."""
    for d in (8, 72):
        check(Case(op, dtype, 2, 35, d))


@pytest.mark.parametrize("dtypes", ((torch.float32, torch.float16), (torch.bfloat16, torch.float16)), ids=str)
@pytest.mark.parametrize("op", INPUTS)
def test_any_mix_of_dtypes(op, dtypes):
    """As autocast does to a model in another dtype: y and gate have one dtype, h, shift and scale another."""
    case, (stream, branch) = Case(op, "fp32", 2, 35, 40), dtypes

    def make_inputs(dtype):
        kinds = {"x": stream, "y": torch.bfloat16, "gate": branch, "shift": branch, "scale": torch.float32}
        values = zip(INPUTS[op], case.inputs(), strict=True)
        rounded = {name: t.detach().to(kinds.get(name, branch)) for name, t in values}
        return [t.to(dtype or t.dtype).requires_grad_() for t in rounded.values()]

    def call(*args, backend):
        with torch.autocast("cpu", branch):
            return getattr(ops, op)(**dict(zip(INPUTS[op], args, strict=True)), backend=backend)

    compare(call, make_inputs, names=case.names(), weights=case.weights(), backend="host")


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("dtype", ("fp32", "mixed"))
def test_bit_equal_for_any_number_of_threads(op, dtype, with_threads):
    case = Case(op, dtype, b=2, n=300, d=72)
    first, *others = (with_threads(n, results, case) for n in (1, 2, 7))
    for other in others:
        for name, a, b in zip(case.names(), first, other, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("op", INPUTS)
def test_bit_equal_for_any_batch(op):
    case = Case(op, "bf16", b=3, n=33, d=40)
    whole = case.call(*case.inputs(), backend="host")
    part = case.call(*(t[1:2] if t.dim() > 1 else t for t in case.inputs()), backend="host")
    for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (whole, part)), strict=True):
        assert torch.equal(a[1:2], b)


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("value, channel", ((NAN, 0), (INF, 15), (-INF, 39), (NAN, 39)))
def test_non_finite_values_stay_in_their_row(op, value, channel, isa):
    for name in INPUTS[op]:
        case = Case(op, "bf16", b=3, n=5, d=40)
        inputs = case.inputs()
        target = dict(zip(INPUTS[op], inputs, strict=True))[name]
        with torch.no_grad():
            target[(1, 2, channel) if target.dim() == 3 else (1, channel) if target.dim() == 2 else channel] = value
        out = case.call(*inputs, backend="host")
        expected = case.call(*inputs, backend="reference")
        for a, b in zip(*(t if isinstance(t, tuple) else (t,) for t in (out, expected)), strict=True):
            assert torch.equal(a.isfinite(), b.isfinite()), name
        assert not b.isfinite().all()  # the last output depends on every input


@pytest.mark.parametrize("op", INPUTS)
def test_non_finite_gradients_propagate(op):
    case = Case(op, "fp32", b=2, n=5, d=40)
    weights = [w.clone() for w in case.weights()]
    weights[-1][1, 2, 3] = NAN
    grads = run(lambda *a: case.call(*a, backend="host"), case.inputs(), weights)[len(OUTPUTS[op]) :]
    for name, g in zip(INPUTS[op], grads, strict=True):
        if name != "bias":
            assert g[1].isnan().any() and g[0].isfinite().all(), name


@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
def test_subnormal_numbers_are_kept(dtype, isa):
    kind = DTYPES[dtype][0]
    tiny = torch.finfo(kind).tiny
    x = (torch.rand(1, 3, 40, generator=torch.Generator().manual_seed(1)) * tiny).to(kind)
    assert ((x > 0) & (x < tiny)).sum() > 100
    zero = torch.zeros(1, 40, dtype=kind)
    assert torch.equal(ops.gated_residual(x, x, zero, backend="host"), x)
    assert torch.equal(ops.gated_residual(x * 0, x, zero + 1, backend="host"), x)


def every_16_bit_value(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_every_value_is_read_and_written(dtype, isa):
    x = every_16_bit_value(dtype).view(1, 8, -1)
    zero = torch.zeros(1, x.shape[-1], dtype=dtype)
    out = host.gated_residual(x, torch.zeros_like(x), zero, None)
    assert torch.equal(out.isnan(), x.isnan())
    kept = ~x.isnan()
    assert torch.equal(out[kept].view(torch.int16), (x + 0)[kept].view(torch.int16))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_rounds_to_nearest_even(dtype, isa):
    """Float32 numbers on, next to and between the 16-bit values, and beyond the largest."""
    values = every_16_bit_value(dtype)
    values = values[values.isfinite()].float()
    middle = (values + values.roll(1)) / 2
    largest = torch.tensor([torch.finfo(dtype).max * s for s in (1.0, 1.001, 1.01, -1.01)] * 2)
    numbers = torch.cat([values, middle, middle * (1 + 2**-22), middle * (1 - 2**-22), largest])
    numbers = numbers[: len(numbers) // 8 * 8].view(1, 8, -1)
    zero = torch.zeros(1, numbers.shape[-1], dtype=dtype)
    # h = 0 * (1 + scale) + shift, for a constant row of x
    x = torch.zeros(1, 1, numbers.shape[-1])
    for row in numbers[0]:
        h, _, _ = host.layer_norm_modulate(x, row.view(1, -1), zero, 1e-6, dtype)
        assert torch.equal(h[0, 0], row.to(dtype))


@pytest.mark.parametrize("op", INPUTS)
def test_misaligned_storage(op):
    """Rows may start at any element, not only at multiples of a vector."""
    case = Case(op, "bf16", b=2, n=35, d=40)

    def shifted(t):
        return torch.cat([t.new_zeros(3), t.detach().flatten()])[3:].view(t.shape).requires_grad_()

    aligned = results(case)
    moved = run(lambda *a: case.call(*a, backend="host"), [shifted(t) for t in case.inputs()], case.weights())
    for name, a, b in zip(case.names(), aligned, moved, strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("requires_grad", (True, False))
def test_opcheck(op, requires_grad):
    case = Case(op, "bf16", b=2, n=3, d=16, layout="strided")
    named = dict(zip(INPUTS[op], [t.requires_grad_(requires_grad) for t in case.inputs()], strict=True))
    named |= {"eps": 1e-6, "out_dtype": torch.bfloat16, "backend": "host"}
    schema = getattr(torch.ops.ditfast, op).default
    torch.library.opcheck(schema, [named[a.name] for a in schema._schema.arguments])
