"""A training step: forward, backward, clipping, fused AdamW, weight averaging.

If weights are not float32, AdamW and the average use float32 master weights, as in `ditfast.train`.
"""

from copy import deepcopy

import torch

from ditfast.diffusion import create_diffusion
from ditfast.training.weights import Weights, norm_of
from harness.model.variants import build
from harness.verdicts import is_ours

LR, CLIP, DECAY = 1e-4, 1.0, 0.9999


def gradients(model, workload, inputs):
    """The model's output and the gradients of the mean loss with respect to the parameters, in order.

    The losses are not compared: a mean over all pixels may be nearly exact by chance, leaving no error budget.
    """
    x, t, y = inputs
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).to(x)
    diffusion, outputs = create_diffusion(""), []

    def watched(*args, **kwargs):
        outputs.append(model(*args, **kwargs))
        return outputs[-1]

    with workload.context():
        terms = diffusion.training_losses(watched, x, t, {"y": y}, noise)
    wanted = [p for p in model.parameters() if p.requires_grad]
    return [outputs[0].detach(), *torch.autograd.grad(terms["loss"].mean(), wanted)]


def make_step(variant: str, model, workload):
    """A function that takes training steps on its own copy of the weights."""
    own = deepcopy(model)
    step = _OursStep if is_ours(variant) else _PlainStep
    return step(own, build(variant, own), workload)


def make_weights(model) -> Weights:
    """The model's weights as in `ditfast.train`, with masters if they are not float32."""
    named = dict(model.named_parameters())
    is_low = any(p.dtype != torch.float32 for p in named.values())
    return Weights(model, LR, 0, {name: p.detach().float() for name, p in named.items()} if is_low else None)


class _Step:
    def __init__(self, model, call, workload):
        self.model, self.call, self.workload, self.diffusion = model, call, workload, create_diffusion("")
        self.start()

    def _backward(self, x, t, y):
        with self.workload.context():
            loss = self.diffusion.training_losses(self.call, x, t, {"y": y})["loss"].mean()
        loss.backward()
        return loss.detach()


class _PlainStep(_Step):
    """A hand-written step with PyTorch's fused and foreach functions."""

    def start(self):
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.masters = [p.detach().float() for p in self.params]  # the weights themselves if they are float32
        self.average = [value.clone() for value in self.masters]
        self.optimizer = torch.optim.AdamW(self.masters, LR, weight_decay=0, fused=True)

    def __call__(self, x, t, y):
        loss = self._backward(x, t, y)
        torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        for p, value in zip(self.params, self.masters, strict=True):
            p.grad, value.grad = None, p.grad.float()
        self.optimizer.step()
        torch._foreach_lerp_(self.average, self.masters, 1 - DECAY)
        if self.params[0].dtype != torch.float32:
            torch._foreach_copy_([p.detach() for p in self.params], self.masters)
        self.optimizer.zero_grad()
        return loss


class _OursStep(_Step):
    """A step as in `ditfast.train`."""

    def start(self):
        self.weights = make_weights(self.model)

    def __call__(self, x, t, y):
        loss = self._backward(x, t, y)
        norm = norm_of(self.weights.take_gradients())
        self.weights.update(LR, DECAY, skip=(~norm.isfinite()).float(), scale=(norm / CLIP).clamp(min=1))
        return loss
