import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_values import GOLDEN, arr, close, fill

from ditfast.models import DiT


class Gaussian(torch.nn.Module):
    """The exact noise predictor for normal data with a mean and a standard deviation per pixel."""

    def __init__(self, diffusion, mean=0.3, std=0.5):
        super().__init__()
        alphas_cumprod = np.cumprod(1 - diffusion.original_betas)
        self.alphas_cumprod = torch.nn.Parameter(torch.from_numpy(alphas_cumprod).float())
        self.mean, self.std = mean, std

    def forward(self, x, t):
        # schedulers may ask for fractional timesteps
        low, part = t.long(), t - t.long()
        table = self.alphas_cumprod.log()
        ends = table[low], table[(low + 1).clamp(max=len(table) - 1)]
        a = torch.lerp(*ends, part.to(table.dtype)).exp().view(-1, *[1] * (x.dim() - 1))
        return (1 - a).sqrt() * (x - a.sqrt() * self.mean) / (a * self.std**2 + 1 - a)


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture(scope="session")
def golden():
    """Golden values and the model they were computed with, by tag."""

    def load(tag):
        values = {
            k: torch.from_numpy(v) if v.ndim else v for k, v in np.load(GOLDEN / f"diffusion_{tag}.npz").items()
        }
        model = fill(DiT(**json.loads(str(values["cfg"])))).eval()
        return SimpleNamespace(tag=tag, values=values, model=model)

    return {tag: load(tag) for tag in ("tiny64", "tiny72")}


@pytest.fixture
def kit():
    return SimpleNamespace(arr=arr, close=close, Gaussian=Gaussian)
