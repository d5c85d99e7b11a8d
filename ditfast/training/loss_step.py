"""A model and its objective as one module."""

import torch

from ditfast.models import DiT
from ditfast.training.objective import Objective


class LossStep(torch.nn.Module):
    """The differentiated part of a step. DDP and torch.compile wrap this module rather than the model, because
    MeanFlow's tangents cannot pass through them.

    Args:
        model: the model to train.
        dtype: of the model's input; None for that of the data.
    """

    def __init__(self, model: DiT, objective: Objective, dtype: torch.dtype | None = None):
        super().__init__()
        self.model, self._objective, self._dtype = model, objective, dtype

    def forward(
        self, x: torch.Tensor, y: torch.Tensor, times: tuple[torch.Tensor, ...], noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-sample loss and per-sample value to log, (b,) each.

        Args:
            x, noise: (b, C, H, W).
            y: (b,) labels.
            times: (b,) each, as drawn by the objective.
        """
        terms = self._objective.losses(self._predict, x, y, times, noise)
        return terms["loss"], terms[self._objective.shown]

    def _predict(self, x, t, y, **stretch):
        return self.model(x.to(self._dtype or x.dtype), t, y, **stretch).float()
