"""Tangents of layer_norm_modulate, gated_residual and the junction in C++ on the CPU meet the contract."""

import itertools
from functools import partial

import pytest
import torch
from contract import assert_contract
from ops.row_ops import DTYPES, INPUTS, LAYOUTS, OUTPUTS, Case
from pairwise import pairwise

from ditfast.ops import host, reference

pytestmark = pytest.mark.usefixtures("one_thread")
EPS = 1e-6
SHAPES = (  # B, N, D: less than a vector, several and a remainder; one task of rows, several and a remainder
    (1, 1, 8),
    (3, 5, 24),
    (0, 5, 40),
    (2, 0, 16),
    (2, 77, 72),
    (3, 33, 384),
    (1, 40, 1160),
)
AXES = {"dtype": tuple(DTYPES), "shape": SHAPES, "layout": LAYOUTS[:3], "of_tangents": LAYOUTS, "bias": (True, False)}
CASES = [
    (Case(op, c["dtype"], *c["shape"], c["layout"], c["bias"]), c["of_tangents"])
    for op in INPUTS
    for c in pairwise(lambda c: 0, **AXES)
    if op != "layer_norm_modulate" or c["bias"]
]


def problem(case, layout="dense"):
    """Inputs by name, and their tangents, which have other strides."""
    inputs = dict(zip(INPUTS[case.op], case.inputs(), strict=True))
    inputs = {name: t.detach() for name, t in inputs.items() if t is not None}
    return inputs, tangents_of(inputs, case, layout)


def tangents_of(inputs, case, layout):
    g = torch.Generator().manual_seed(9)
    lies = Case(case.op, d=case.d, layout=layout).lay_out
    shapes = {name: () if layout == "expanded" else t.shape for name, t in inputs.items()}
    return {
        name: lies(torch.randn(shapes[name], generator=g).to(t.dtype)).expand(t.shape) for name, t in inputs.items()
    }


def host_jvp(op, inputs, tangents, out_dtype):
    """Outputs, statistics, and the tangents of the outputs."""
    i, t = ({name: given.get(name) for name in INPUTS[op]} for given in (inputs, tangents))
    if op == "layer_norm_modulate":
        return host.layer_norm_modulate_jvp(*i.values(), EPS, out_dtype, *t.values())
    if op == "gated_residual":
        return host.gated_residual_jvp(*i.values(), *t.values())
    *rows, bias = i.values()
    return host.junction_jvp(*rows, EPS, bias, out_dtype, *t.values())


def host_forward(op, inputs, out_dtype):
    i = {name: inputs.get(name) for name in INPUTS[op]}
    if op == "layer_norm_modulate":
        return host.layer_norm_modulate(*i.values(), EPS, out_dtype)
    if op == "gated_residual":
        return (host.gated_residual(*i.values()),)
    *rows, bias = i.values()
    return host.junction(*rows, EPS, bias, out_dtype)


def reference_jvp(op, inputs, tangents, out_dtype):
    """The tangents of the outputs."""
    options = {} if op == "gated_residual" else {"eps": EPS, "out_dtype": out_dtype}
    function = partial(getattr(reference, op), **options)

    def by_position(*values):
        return function(**dict(zip(inputs, values, strict=True)))

    result = torch.func.jvp(by_position, tuple(inputs.values()), tuple(tangents.values()))[1]
    return result if isinstance(result, tuple) else (result,)


def check(case, layout="dense"):
    out_dtype = DTYPES[case.dtype][1]
    inputs, tangents = problem(case, layout)
    got = host_jvp(case.op, inputs, tangents, out_dtype)
    expected = host_forward(case.op, inputs, out_dtype)
    for a, b in zip(got, expected, strict=False):  # the primal comes first, and equals forward's
        assert torch.equal(a, b)
    exact = [{name: t.double() for name, t in given.items()} for given in (inputs, tangents)]
    low = reference_jvp(case.op, inputs, tangents, out_dtype)
    ref = reference_jvp(case.op, *exact, torch.float64)
    for name, *tensors in zip(OUTPUTS[case.op], got[len(expected) :], low, ref, strict=True):
        assert_contract(f"tangent of {name}", *tensors)


def label(value):
    c = value if isinstance(value, Case) else None
    return f"{c.op}-{c.dtype}-{c.b}x{c.n}x{c.d}-{c.layout}-{'bias' if c.bias else 'nobias'}" if c else None


@pytest.mark.parametrize("case, layout", CASES, ids=label)
def test_contract(case, layout, poisoned):
    check(case, layout)


@pytest.mark.parametrize("op", INPUTS)
def test_contract_in_every_instruction_set(op, isa, poisoned):
    """Rows of less than a vector, and of several and a remainder."""
    for dtype, d in itertools.product(DTYPES, (8, 72)):
        check(Case(op, dtype, 2, 35, d))


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("dtype", ("fp32", "mixed"))
def test_none_is_zero(op, dtype):
    """Every subset of missing tangents."""
    case = Case(op, dtype, 2, 3, 40)
    out_dtype = DTYPES[dtype][1]
    inputs, tangents = problem(case)
    for given in itertools.product((True, False), repeat=len(inputs)):
        absent = {name for name, is_given in zip(inputs, given, strict=True) if not is_given}
        some = {name: t for name, t in tangents.items() if name not in absent}
        zeros = {name: torch.zeros_like(t) if name in absent else t for name, t in tangents.items()}
        results = (host_jvp(op, inputs, t, out_dtype) for t in (some, zeros))
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b), absent


@pytest.mark.parametrize("op", INPUTS)
def test_any_mix_of_dtypes(op, poisoned):
    """y and gate have one dtype, h, shift and scale another: the kernel then uses float32."""
    inputs, tangents = problem(Case(op, "fp32", 2, 35, 40))
    kinds = {"y": torch.bfloat16, "gate": torch.bfloat16, "scale": torch.float16}
    inputs, tangents = (
        {name: t.to(kinds.get(name, t.dtype)) for name, t in given.items()} for given in (inputs, tangents)
    )
    got = host_jvp(op, inputs, tangents, torch.float16)
    exact = [{name: t.double() for name, t in given.items()} for given in (inputs, tangents)]
    low, ref = reference_jvp(op, inputs, tangents, torch.float16), reference_jvp(op, *exact, torch.float64)
    for name, *tensors in zip(OUTPUTS[op], got[-len(ref) :], low, ref, strict=True):
        assert_contract(f"tangent of {name}", *tensors)


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("dtype", ("fp32", "mixed"))
def test_bit_equal_for_any_number_of_threads_and_any_batch(op, dtype, with_threads):
    case, out_dtype = Case(op, dtype, b=2, n=100, d=72), DTYPES[dtype][1]
    inputs, tangents = problem(case)
    first, *others = (with_threads(n, host_jvp, op, inputs, tangents, out_dtype) for n in (1, 2, 7))
    second = [{k: t[1:] if t.dim() > 1 else t for k, t in given.items()} for given in (inputs, tangents)]
    for other in others:
        assert all(map(torch.equal, first, other))
    for whole, part in zip(first, host_jvp(op, *second, out_dtype), strict=True):
        assert torch.equal(whole[1:], part)


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("value, channel", ((float("nan"), 0), (float("inf"), 15), (float("nan"), 39)))
def test_non_finite_values_stay_in_their_row(op, value, channel, isa):
    """A tangent's NaN appears in the tangents of that row, or sample, and in no primal."""
    for name in INPUTS[op]:
        inputs, tangents = problem(Case(op, "bf16", b=3, n=5, d=40))
        target = tangents[name]
        target[(1, 2, channel) if target.dim() == 3 else (1, channel) if target.dim() == 2 else channel] = value
        got = host_jvp(op, inputs, tangents, torch.bfloat16)
        expected = reference_jvp(op, inputs, tangents, torch.bfloat16)
        primals, got_tangents = got[: -len(expected)], got[-len(expected) :]
        assert all(t.isfinite().all() for t in primals)
        for a, b in zip(got_tangents, expected, strict=True):
            assert torch.equal(a.isfinite(), b.isfinite()), name
        assert not b.isfinite().all()
