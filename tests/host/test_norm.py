"""The norm of many tensors together in C++ on the CPU, against float64."""

import pytest
import torch

from ditfast.ops import host

_C = pytest.importorskip("ditfast._C")
pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = (3, 0, 1, 31, 32, 33, 140_001, 16)  # fewer and more than a task takes, whole vectors and rests


def tensors(dtype, spread=1.0):
    g = torch.Generator().manual_seed(6)
    return [(torch.randn(size, generator=g) * spread).to(dtype) for size in SIZES]


def exact(tensors):
    return torch.cat([t.double().flatten() for t in tensors]).norm()


def bits(tensors):
    """In float64, before it is rounded."""
    addresses, elements = [t.data_ptr() for t in tensors], [t.numel() for t in tensors]
    return _C.norm(host.CODES[tensors[0].dtype], addresses, elements, torch.get_num_threads())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, isa):
    """To the last bits, also where squares leave the range of float32."""
    for spread in (1.0,) if dtype == torch.float16 else (1e-30, 1.0, 1e30):
        given = tensors(dtype, spread)
        assert bits(given) == pytest.approx(exact(given).item(), rel=1e-13)
        norm = host.norm(given)
        assert norm.dtype == torch.float32 and norm.shape == ()
        torch.testing.assert_close(norm, exact(given).float(), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_whatever_computes_it(dtype, with_threads):
    given, before, found = tensors(dtype), _C.isa(), set()
    for isa in _C.isas():
        _C.use_isa(isa)
        found |= {with_threads(n, bits, given) for n in (1, 2, 7)}
    _C.use_isa(before)
    assert len(found) == 1


@pytest.mark.parametrize("at", (0, 31, 139_999, 140_000))
def test_what_is_not_finite_stays_so(at, isa):
    for dtype in DTYPES:
        for value in (float("nan"), float("inf"), -float("inf")):
            given = tensors(dtype)
            given[6][at] = value
            found = host.norm(given)
            assert found.isnan() if value != value else found == float("inf")


def test_gaps_and_what_is_between_them():
    wide = torch.full((40, 64), float("nan"))
    wide[:, ::2] = torch.randn(40, 32)
    assert host.norm([wide[:, ::2].t(), torch.ones(3)]) == host.norm([wide[:, ::2].t().contiguous(), torch.ones(3)])


def test_nothing_is_zero():
    assert host.norm([torch.empty(0), torch.zeros(5)]) == 0
