"""Tests with the fixture ``isa`` run once per instruction set that has kernels for this CPU."""

import pytest
import torch

_C = pytest.importorskip("ditfast._C")


@pytest.fixture(params=_C.isas())
def isa(request):
    before = _C.isa()
    _C.use_isa(request.param)
    yield request.param
    assert _C.isa() == request.param
    _C.use_isa(before)


@pytest.fixture
def with_threads():
    """Call a function with torch set to a number of threads."""

    def call(threads, function, *args):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(before)

    return call
