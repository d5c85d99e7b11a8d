"""Every test with the fixture ``isa`` runs once for each instruction set that this CPU has kernels for."""

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
    """Calls a function as if torch had been given so many threads."""

    def call(threads, function, *args):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(before)

    return call
