"""Values of the original implementation, reproduced by the kernels on this device."""

import json

import numpy as np
import pytest
import torch
from golden_values import GOLDEN, arr, close, fill

from ditfast import DiT, use_backend

RTOL = 1e-4  # the original ran on a CPU, with a different order of sums and a different exp


@pytest.fixture(params=("tiny64", "tiny72"))
def case(request, device):
    values = dict(np.load(GOLDEN / f"dit_{request.param}.npz"))
    model = fill(DiT(**json.loads(str(values["cfg"])))).eval().to(device)
    return request.param, values, model, [torch.from_numpy(values[name]).to(device) for name in "xty"]


def expected(values, name):
    return torch.from_numpy(values[name])


@torch.no_grad()
@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("triton", "auto"))
def test_output(case, backend):
    _, values, model, inputs = case
    with use_backend(backend):
        close(model(*inputs).cpu(), expected(values, "out"), RTOL)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ("triton", "auto"))
def test_gradients(case, backend):
    tag, values, model, (x, t, y) = case
    x.requires_grad_()
    with use_backend(backend):
        out = model(x, t, y)
    (out * arr(f"{tag}/w", tuple(out.shape)).to(x.device)).mean().backward()
    close(x.grad.cpu(), expected(values, "grad_x"), RTOL)
    for name, p in model.named_parameters():
        if f"grad:{name}" in values:
            close(p.grad.cpu(), expected(values, f"grad:{name}"), RTOL)
        elif p.requires_grad:
            assert p.grad.norm().item() == pytest.approx(values[f"gradnorm:{name}"].item(), rel=RTOL), name
