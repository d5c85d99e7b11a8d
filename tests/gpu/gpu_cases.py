"""Which kernels are tested, at which sizes."""

import pytest

from ditfast.ops.backend import why_not
from ditfast.ops.verify import PRECISIONS
from harness.problems import Problem

gpu = pytest.mark.gpu
TINY = pytest.param((2, 16, 72), id="tiny")  # B, N, D
SIZES = (TINY, *(pytest.param((32, n, d), marks=gpu, id=f"32x{n}x{d}") for n in (256, 1024) for d in (1152, 1024)))
REAL = (pytest.param((2, 4, 72), id="tiny"), pytest.param((32, 256, 1152), marks=gpu, id="real"))
ROWS = ("layer_norm_modulate", "gated_residual", "junction", "patch_embed")
KERNELS = (
    *((name, "triton") for name in (*ROWS, "mlp", "patchify", "unpatchify", "attention", "qkv_attention")),
    ("attention", "cuda"),
    ("qkv_attention", "cuda"),
)


def exists(name, backend, dtype):
    """Operations without a residual stream know no autocast mix; the CUDA attention takes 16-bit dtypes."""
    return not (dtype == "autocast" and name not in ROWS or dtype == "fp32" and backend == "cuda")


CASES = tuple((*kernel, dtype) for kernel in KERNELS for dtype in PRECISIONS if exists(*kernel, dtype))


def problem(name, backend, dtype, size, device):
    reason = why_not(name if name != "junction" else "gated_residual_layer_norm_modulate", backend, device)
    if reason is not None:
        pytest.skip(reason)
    return Problem(name, *size, dtype, device)
