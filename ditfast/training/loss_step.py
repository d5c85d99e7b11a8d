"""A model and its objective as one module."""

import torch

from ditfast.training.objective import Objective


class LossStep(torch.nn.Module):
    """What a step computes the gradients of: DDP and torch.compile stand around it, because no tangent, as of
    MeanFlow, passes through them.

    Args:
        model: what is trained.
        dtype: that of what the model is given; None for that of the data.
    """

    def __init__(self, model, objective: Objective, dtype: torch.dtype | None = None):
        super().__init__()
        self.model, self._objective, self._dtype = model, objective, dtype

    def forward(self, x, y, times, noise):
        """The loss of each sample, and what is logged of it: (b,) each."""
        terms = self._objective.losses(self._predict, x, y, times, noise)
        return terms["loss"], terms[self._objective.shown]

    def _predict(self, x, t, y, **stretch):
        return self.model(x.to(self._dtype or x.dtype), t, y, **stretch).float()
