"""Guided DDIM steps: a run of the workload's length, including the run's one-time work."""

from contextlib import nullcontext

import torch

from ditfast.diffusion import create_diffusion
from ditfast.models.guidance import guide
from ditfast.sampling.engine import Engine
from ditfast.sampling.sampler import Guidance, with_guidance
from harness.model.variants import PATCHED, build
from harness.verdicts import is_ours

SCALE, CHANNELS, NULL = 4.0, 3, 1000


class Guided:
    """A model called with duplicated latents, as in the original."""

    def __init__(self, model, source):
        self.model, self.y_embedder = model, source.y_embedder

    def forward_with_cfg(self, x, t, y, scale, channels):
        half = x[: len(x) // 2]
        return guide(self.model(torch.cat([half, half]), t, y), scale, channels)


def make_run(variant: str, model, workload):
    """A sampling function: x (B, C, S, S) and labels (B,) to x after the first steps."""
    if not is_ours(variant) or variant == PATCHED:
        return _Run(Guided(build(variant, model), model), workload)
    dtype = torch.bfloat16 if workload.dtype == "autocast" else torch.float32  # of autocast
    return _Run(Engine(model, dtype, compile=variant.endswith("+compile")), workload)


class _Run:
    def __init__(self, model, workload):
        self.model, self.workload = model, workload
        self.packs = isinstance(model, Engine)
        self.ready = model.packed if self.packs else nullcontext  # around all runs
        self.diffusion = create_diffusion("ddim50")

    def __call__(self, x, t, y, steps=None):
        """x after the first ``steps`` of 50 steps, starting from noise; t is not read."""
        calls = self.diffusion.timestep_map[::-1][: steps or self.workload.steps]
        guidance = Guidance(SCALE, 0.0, 1.0, CHANNELS)
        predict = with_guidance(self.model, y, guidance, [0.5] * len(calls))
        labels = [*y.tolist(), NULL]
        if not isinstance(self.model, Engine):
            return self._steps(predict, x, len(calls))
        with self.model.run(calls, labels):
            return self._steps(predict, x, len(calls))

    def _steps(self, predict, x, count):
        with torch.no_grad(), self.workload.context():
            for i in range(49, 49 - count, -1):
                t = torch.full((len(x),), i, device=x.device)
                x = self.diffusion.ddim_sample(predict, x, t, clip_denoised=False)["sample"]
        return x
