"""The papers' equations. ``c`` holds a batch's coefficients, gathered at each sample's timestep: (B, 1, …)."""

import torch

from ditfast.diffusion.schedule import Tables


def x_t(c: Tables, x_start: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A noisy sample from a clean one: q(x_t | x_0). Source: Ho et al. 2020, equation 4."""
    return c.sqrt_alphas_cumprod * x_start + c.sqrt_one_minus_alphas_cumprod * noise


def x_start(c: Tables, x_t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """The clean sample implied by the predicted noise. Source: Ho et al. 2020, equation 15."""
    return c.sqrt_recip_alphas_cumprod * x_t - c.sqrt_recipm1_alphas_cumprod * eps


def eps(c: Tables, x_t: torch.Tensor, x_start: torch.Tensor) -> torch.Tensor:
    """The noise implied by a clean sample. Source: Ho et al. 2020, equation 15, solved for the noise."""
    return (c.sqrt_recip_alphas_cumprod * x_t - x_start) / c.sqrt_recipm1_alphas_cumprod


def posterior_mean(c: Tables, x_start: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """The mean of q(x_{t-1} | x_t, x_0). Source: Ho et al. 2020, equation 7."""
    return c.posterior_mean_coef1 * x_start + c.posterior_mean_coef2 * x_t


def learned_log_variance(c: Tables, v: torch.Tensor) -> torch.Tensor:
    """The log variance between the posterior's (v = -1) and beta's (v = 1).

    Source: Nichol & Dhariwal 2021, equation 15.
    """
    fraction = (v + 1) / 2
    return fraction * c.log_betas + (1 - fraction) * c.posterior_log_variance_clipped


def ddim_sigma(c: Tables, eta: float) -> torch.Tensor:
    """The noise added by a DDIM step: none at eta = 0, DDPM's at 1. Source: Song et al. 2021, equation 16."""
    before, now = c.alphas_cumprod_prev, c.alphas_cumprod
    return eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()


def ddim_mean(
    alphas_cumprod: torch.Tensor, x_start: torch.Tensor, eps: torch.Tensor, sigma: torch.Tensor | float = 0.0
) -> torch.Tensor:
    """A sample's mean at another noise level, along the predicted noise. Source: Song et al. 2021, equation 12."""
    return x_start * alphas_cumprod.sqrt() + (1 - alphas_cumprod - sigma**2).sqrt() * eps
