"""Correctness of a variant: output and every gradient against the numerical contract."""

from copy import deepcopy

import torch

from ditfast.ops import contract
from harness.block.variants import Stack

CHUNK = 8  # samples in float64 at a time, to bound memory
MARGIN = 1.25  # ditfast+compile and compile fuse, and so round, differently


def names(stack) -> list[str]:
    """Names of the tensors returned by `workload.forward_backward`."""
    return ["out", *(f"grad of {n}" for n in ("x", "c", *(n for n, _ in stack.named_parameters())))]


def reference(blocks, inputs):
    """Results of `forward_backward` in float64."""
    stack = Stack(deepcopy(blocks).double())
    parts, total = [], None
    for x, c, grad in zip(*(t.detach().double().split(CHUNK) for t in inputs), strict=True):
        x, c = x.requires_grad_(), c.requires_grad_()
        out = stack(x, c)
        dx, dc, *gradients = torch.autograd.grad(out, [x, c, *stack.parameters()], grad)
        parts.append((out.detach(), dx, dc))
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
    return [*(torch.cat(part) for part in zip(*parts, strict=True)), *total]


def compare(labels, got, low, ref) -> list[dict]:
    """The verdict of `ditfast.ops.contract.verdict` on each tensor; forward alone has only the output."""
    if len(got) == 1:
        labels, low, ref = labels[:1], low[:1], ref[:1]
    rows = zip(labels, got, low, ref, strict=True)
    batched = ("out", "grad of x", "grad of c")  # the others are parameters
    return [contract.verdict(label, *(t.detach() for t in three), label in batched) for label, *three in rows]


def excused(verdicts: list[dict], plain: list[dict]) -> list[dict]:
    """Verdicts on ditfast+compile, without a reason wherever ``plain``, the verdict on compile, is as far off."""
    found = []
    for ours, theirs in zip(verdicts, plain, strict=True):
        is_shared = None not in (ours["used"], theirs["reason"], theirs["used"])
        is_excused = is_shared and ours["used"] <= MARGIN * theirs["used"]
        found.append(ours | {"reason": None} if is_excused else ours)
    return found
