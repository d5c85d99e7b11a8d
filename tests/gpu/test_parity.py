"""Every kernel meets the numerical contract, forward and backward, at real sizes and in all dtype mixes."""

from functools import lru_cache

import pytest
import torch
from gpu.gpu_cases import CASES, REAL, SIZES, problem

from harness.problems import judge


@lru_cache(maxsize=1)
def verdicts(made, backend):
    return judge(made, made.results(backend))


@pytest.fixture
def facts(name, backend, dtype, direction, size, record_property):
    """Recorded before the test runs: a kernel can end its process."""
    facts = {"op": name, "backend": backend, "dtype": dtype, "direction": direction, "size": "x".join(map(str, size))}
    for key, value in facts.items():
        record_property(key, value)


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.usefixtures("facts")
@pytest.mark.parametrize("direction", ("fwd", "bwd"))
@pytest.mark.parametrize("name, backend, dtype", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_contract(name, backend, dtype, size, direction, device):
    made = problem(name, backend, dtype, size, device)
    try:
        verdict = verdicts(made, backend)[direction]
    except torch.OutOfMemoryError:
        pytest.skip("the float64 reference does not fit on this GPU")
    assert verdict["reason"] is None, verdict["reason"]


@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("name, backend, dtype", [case for case in CASES if case[2] == "bf16"])
@pytest.mark.parametrize("size", REAL)
def test_repeats_are_bit_equal(name, backend, dtype, size, device):
    made = problem(name, backend, dtype, size, device)
    first = made.results(backend)
    for _ in range(100 if device == "cuda" else 1):
        for key, value in made.results(backend).items():
            assert torch.equal(value, first[key]), key


@pytest.mark.parametrize("dtype", ("bf16", "fp16", "fp32"))
@pytest.mark.parametrize("size", SIZES)
def test_mlp_in_inference(dtype, size, device):
    """Without gradients, GELU runs inside the library's GEMM."""
    made = problem("mlp", "triton", dtype, size, device)
    with torch.no_grad():
        (y,) = made.call(*made.inputs(), backend="triton")
    verdict = judge(made, {"y": y})["fwd"]
    assert verdict["reason"] is None, verdict["reason"]
