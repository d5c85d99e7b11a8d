"""Classifier guidance. ``cond_fn(x, t, **model_kwargs)`` returns the gradient of log p(y | x_t) with respect to x_t.

The public functions are methods of `GaussianDiffusion`: ``diffusion`` is self, which cannot be imported here.
"""

from collections.abc import Callable
from typing import Any

import torch

from ditfast.diffusion import equations


def _gradient(diffusion, cond_fn, x, t, model_kwargs):
    return cond_fn(x, diffusion.original_timesteps(t), **(model_kwargs or {}))


def condition_mean(
    diffusion: Any,
    cond_fn: Callable[..., torch.Tensor],
    p_mean_var: dict,
    x: torch.Tensor,
    t: torch.Tensor,
    model_kwargs: dict | None = None,
) -> torch.Tensor:
    """The mean from `p_mean_variance`, shifted along the gradient. Source: Dhariwal & Nichol 2021, algorithm 1."""
    gradient = _gradient(diffusion, cond_fn, x, t, model_kwargs)
    return p_mean_var["mean"] + p_mean_var["variance"] * gradient


def condition_score(
    diffusion: Any,
    cond_fn: Callable[..., torch.Tensor],
    p_mean_var: dict,
    x: torch.Tensor,
    t: torch.Tensor,
    model_kwargs: dict | None = None,
) -> dict:
    """A copy of the dict from `p_mean_variance`, with the predicted noise shifted along the gradient.

    Source: Dhariwal & Nichol 2021, algorithm 2; Song et al. 2021, "Score-Based Generative Modeling through SDEs".
    """
    c = diffusion.coefficients(t, x)
    gradient = _gradient(diffusion, cond_fn, x, t, model_kwargs)
    eps = equations.eps(c, x, p_mean_var["pred_xstart"]) - c.sqrt_one_minus_alphas_cumprod * gradient
    pred_xstart = equations.x_start(c, x, eps)
    return {**p_mean_var, "pred_xstart": pred_xstart, "mean": equations.posterior_mean(c, pred_xstart, x)}
