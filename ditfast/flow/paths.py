"""The interpolants x_t = alpha x_1 + sigma noise, t from 0, noise, to 1, data, and what follows from one at a time.

Source: Ma et al. 2024, "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers", sections 2.1 to 2.3.
"""

import math
from typing import Any, NamedTuple

import torch


class Point(NamedTuple):
    """A path at the times of a batch, each (B, 1, …)."""

    alpha: Any
    sigma: Any
    d_alpha: Any  # derivatives by t
    d_sigma: Any
    rate: Any  # d_alpha / alpha; infinite at t = 0 but for VP


def linear(t) -> Point:
    return Point(t, 1 - t, torch.ones_like(t), -torch.ones_like(t), 1 / t)


def gvp(t) -> Point:
    """Generalized variance preserving: sines and cosines."""
    half_pi = math.pi / 2
    alpha, sigma = torch.sin(half_pi * t), torch.cos(half_pi * t)
    return Point(alpha, sigma, half_pi * sigma, -half_pi * alpha, half_pi / torch.tan(half_pi * t))


def vp(t, beta_min=0.1, beta_max=20.0) -> Point:
    """The continuous form of the linear noise schedule. Source: Song et al. 2021, appendix C."""
    s = 1 - t
    log_alpha = -0.25 * s**2 * (beta_max - beta_min) - 0.5 * s * beta_min
    rate = 0.5 * s * (beta_max - beta_min) + 0.5 * beta_min
    alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))  # expm1: sigma is small near data
    return Point(alpha, sigma, alpha * rate, -(alpha**2) * rate / sigma, rate)


PATHS = {"Linear": linear, "GVP": gvp, "VP": vp}


def x_t(p: Point, x1, noise):
    return p.alpha * x1 + p.sigma * noise


def velocity(p: Point, x1, noise):
    """The derivative of x_t by t, which is what a model of velocities learns."""
    return p.d_alpha * x1 + p.d_sigma * noise


def diffusivity(p: Point):
    """w in velocity = rate x_t + w score: half the variance that the reverse of a diffusion adds per time."""
    return p.rate * p.sigma**2 - p.sigma * p.d_sigma


def velocity_from_score(p: Point, x, score):
    return p.rate * x + diffusivity(p) * score


def noise_from_velocity(p: Point, x, v):
    return (p.d_alpha * x - p.alpha * v) / (p.d_alpha * p.sigma - p.alpha * p.d_sigma)


def data_from_score(p: Point, x, score):
    """The expected data at x_t. Source: Efron 2011, "Tweedie's Formula and Selection Bias"."""
    return (x + p.sigma**2 * score) / p.alpha


# w(t, point, norm) of the SDE dx = (velocity + w score) dt + sqrt(2 w) dW. Source: Ma et al. 2024, table 2
DIFFUSION_FORMS = {
    "constant": lambda t, p, norm: torch.full_like(t, norm),
    "SBDM": lambda t, p, norm: norm * diffusivity(p),
    "sigma": lambda t, p, norm: norm * p.sigma,
    "linear": lambda t, p, norm: norm * (1 - t),
    "decreasing": lambda t, p, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t, p, norm: norm * torch.sin(math.pi * t) ** 2,
}
