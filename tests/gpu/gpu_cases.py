"""Which kernels are tested, at which sizes."""

import pytest

from ditfast.ops.backends.availability import why_not
from harness.problems import PROBLEMS, Problem, gpu_kernels

gpu = pytest.mark.gpu
TINY = pytest.param((2, 16, 72), id="tiny")  # B, N, D
SIZES = (TINY, *(pytest.param((32, n, d), marks=gpu, id=f"32x{n}x{d}") for n in (256, 1024) for d in (1152, 1024)))
REAL = (pytest.param((2, 4, 72), id="tiny"), pytest.param((32, 256, 1152), marks=gpu, id="real"))
CASES = gpu_kernels()
KERNELS = tuple(dict.fromkeys((name, backend) for name, backend, _ in CASES))


def problem(name, backend, dtype, size, device):
    reason = why_not(PROBLEMS[name], backend, device)
    if reason is not None:
        pytest.skip(reason)
    return Problem(name, *size, dtype, device)
