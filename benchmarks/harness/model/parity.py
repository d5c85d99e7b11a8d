"""Correctness of a variant: predictions, samples and gradients against the numerical contract."""

from copy import deepcopy
from dataclasses import replace

import torch

from ditfast.ops import contract
from harness.block import parity as blocks
from harness.model.sampling import make_run
from harness.model.training import gradients
from harness.model.variants import build

SAMPLES, STEPS = 2, 2  # the minimum that shows errors across a batch and a run, since float64 is slow


def compute(variant: str, mode: str, model, workload, inputs) -> list[torch.Tensor]:
    """Results for the first samples: predictions (with gradients in training), or samples after guided steps."""
    inputs = [each[:SAMPLES] for each in inputs]
    if mode == "guided":
        return [make_run(variant, model, workload)(*inputs, steps=STEPS)]
    built = build(variant, model)
    if mode == "train":
        return gradients(built, workload, inputs)
    with torch.no_grad(), workload.context():
        return [built(*inputs)]


def labels(mode: str, model) -> list[str]:
    if mode == "train":
        return ["out", *(f"grad of {name}" for name, p in model.named_parameters() if p.requires_grad)]
    return ["sample" if mode == "guided" else "out"]


class Truth:
    """Eager PyTorch, in float64 and in the dtypes of the workload."""

    def __init__(self, mode, model, workload, inputs):
        self.labels = labels(mode, model)
        self.low = compute("eager", mode, model, workload, inputs)
        exact = replace(workload, dtype="fp32")  # without autocast
        x, t, y = inputs
        self.ref = compute("eager", mode, deepcopy(model).double(), exact, (x.double(), t, y))

    def judge(self, got, compiled=None) -> tuple[dict, list[dict]]:
        """Return (worst verdict, all verdicts) on a variant; errors that ``compiled`` shares are excused."""
        rows = zip(self.labels, got, self.low, self.ref, strict=True)
        found = [contract.verdict(label, *(t.detach() for t in three), label == "out") for label, *three in rows]
        found = blocks.excused(found, compiled) if compiled else found
        return contract.worst(found), found
