"""Whether a variant computes the right thing, held to float64.

The rule, for the output and every gradient, where ``low`` is plain PyTorch in the dtype under test and ``ref`` in
float64:

1. max|got - ref| <= 2 * max|low - ref| + 2 ulp, with the ulp at the largest magnitude of ref;
2. relative L2 error <= 2 * that of low + 1 ulp, for each sample, or for a whole parameter.
"""

from copy import deepcopy

import torch
from variants import Stack

CHUNK = 8  # samples in float64 at a time, to bound memory


def names(stack) -> list[str]:
    """What each tensor of `workload.forward_backward` is."""
    return ["out", *(f"grad of {n}" for n in ("x", "c", *(n for n, _ in stack.named_parameters())))]


def reference(blocks, inputs):
    """What `forward_backward` gives in float64."""
    stack = Stack(deepcopy(blocks).double())
    parts, total = [], None
    for x, c, grad in zip(*(t.detach().double().split(CHUNK) for t in inputs), strict=True):
        x, c = x.requires_grad_(), c.requires_grad_()
        out = stack(x, c)
        dx, dc, *gradients = torch.autograd.grad(out, [x, c, *stack.parameters()], grad)
        parts.append((out.detach(), dx, dc))
        total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
    return [*(torch.cat(part) for part in zip(*parts, strict=True)), *total]


def compare(labels, got, low, ref) -> dict:
    """The tensor that uses most of its budget: its name, the error, the budget, and error over budget."""
    found = []
    for i, (label, *tensors) in enumerate(zip(labels, got, low, ref, strict=False)):
        is_per_sample = i < 3  # out, x, c; the rest are parameters
        for error, budget in _errors(*(t.detach().double() for t in tensors), got[i].dtype, is_per_sample):
            used = (error / budget).nan_to_num(nan=float("inf"))
            worst = used.argmax()
            entry = {"tensor": label, "error": error[worst].item(), "budget": budget[worst].item()}
            found.append(entry | {"used": used[worst].item()})
    return max(found, key=lambda entry: entry["used"])


def _errors(got, low, ref, dtype, is_per_sample):
    """(error, budget) by the maximum, and by the L2 norm of each sample."""
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    ulp = eps * 2 ** ref.abs().max().clamp(min=tiny).log2().floor()
    yield ((got - ref).abs().max().view(1), (2 * (low - ref).abs().max() + 2 * ulp).view(1))
    rows = len(ref) if is_per_sample else 1
    got, low, ref = (t.reshape(rows, -1) for t in (got, low, ref))
    norm = ref.norm(dim=1).clamp(min=tiny)
    yield (got - ref).norm(dim=1) / norm, 2 * (low - ref).norm(dim=1) / norm + eps
