"""Divergences and likelihoods of Gaussians."""

import math

import torch


def normal_kl(
    mean1: torch.Tensor, log_variance1: torch.Tensor, mean2: torch.Tensor, log_variance2: torch.Tensor
) -> torch.Tensor:
    """The elementwise KL divergence, in nats, of one diagonal Gaussian from another."""
    log_ratio = -1 + log_variance2 - log_variance1 + torch.exp(log_variance1 - log_variance2)
    return 0.5 * (log_ratio + (mean1 - mean2) ** 2 * torch.exp(-log_variance2))


def approx_standard_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    """A tanh approximation of the standard normal's cumulative distribution function."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretized_gaussian_log_likelihood(
    x: torch.Tensor, means: torch.Tensor, log_scales: torch.Tensor
) -> torch.Tensor:
    """The log probability, in nats, of x's bin among 256 equal bins of [-1, 1]; the outer two are unbounded.

    Source: Ho et al. 2020, equation 13.
    """
    centered, inverse = x - means, torch.exp(-log_scales)
    below_upper = approx_standard_normal_cdf(inverse * (centered + 1 / 255))
    below_lower = approx_standard_normal_cdf(inverse * (centered - 1 / 255))
    inside = torch.where(x > 0.999, 1 - below_lower, below_upper - below_lower)
    return torch.where(x < -0.999, below_upper, inside).clamp(min=1e-12).log()
