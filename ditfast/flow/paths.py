"""The interpolants x_t = alpha x_1 + sigma noise, t from 0, noise, to 1, data, and the quantities derived from them.

Source: Ma et al. 2024, "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant
Transformers", sections 2.1 to 2.3.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch


class Point(NamedTuple):
    """A path at a batch's times, (B, 1, …) each."""

    alpha: torch.Tensor
    sigma: torch.Tensor
    d_alpha: torch.Tensor  # derivatives with respect to t
    d_sigma: torch.Tensor
    rate: torch.Tensor  # d_alpha / alpha; infinite at t = 0, except for VP


def linear(t: torch.Tensor) -> Point:
    return Point(t, 1 - t, torch.ones_like(t), -torch.ones_like(t), 1 / t)


def gvp(t: torch.Tensor) -> Point:
    """Generalized variance preserving: sines and cosines."""
    half_pi = math.pi / 2
    alpha, sigma = torch.sin(half_pi * t), torch.cos(half_pi * t)
    return Point(alpha, sigma, half_pi * sigma, -half_pi * alpha, half_pi / torch.tan(half_pi * t))


def vp(t: torch.Tensor, beta_min: float = 0.1, beta_max: float = 20.0) -> Point:
    """The continuous form of the linear noise schedule. Source: Song et al. 2021, appendix C."""
    s = 1 - t
    log_alpha = -0.25 * s**2 * (beta_max - beta_min) - 0.5 * s * beta_min
    rate = 0.5 * s * (beta_max - beta_min) + 0.5 * beta_min
    alpha, sigma = torch.exp(log_alpha), torch.sqrt(-torch.expm1(2 * log_alpha))  # expm1: sigma is small near data
    return Point(alpha, sigma, alpha * rate, -(alpha**2) * rate / sigma, rate)


PATHS: dict[str, Callable[[torch.Tensor], Point]] = {"Linear": linear, "GVP": gvp, "VP": vp}


def x_t(p: Point, x1: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    return p.alpha * x1 + p.sigma * noise


def velocity(p: Point, x1: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The derivative of x_t with respect to t: the target of a model of velocities."""
    return p.d_alpha * x1 + p.d_sigma * noise


def diffusivity(p: Point) -> torch.Tensor:
    """w in velocity = rate x_t + w score: half the variance that a reverse diffusion adds per unit of time."""
    return p.rate * p.sigma**2 - p.sigma * p.d_sigma


def velocity_from_score(p: Point, x: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    return p.rate * x + diffusivity(p) * score


def noise_from_velocity(p: Point, x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (p.d_alpha * x - p.alpha * v) / (p.d_alpha * p.sigma - p.alpha * p.d_sigma)


def data_from_score(p: Point, x: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """The expected data at x_t. Source: Efron 2011, "Tweedie's Formula and Selection Bias"."""
    return (x + p.sigma**2 * score) / p.alpha


# w(t, point, norm) of the SDE dx = (velocity + w score) dt + sqrt(2 w) dW. Source: Ma et al. 2024, table 2
DIFFUSION_FORMS: dict[str, Callable[[torch.Tensor, Point, float], torch.Tensor]] = {
    "constant": lambda t, p, norm: torch.full_like(t, norm),
    "SBDM": lambda t, p, norm: norm * diffusivity(p),
    "sigma": lambda t, p, norm: norm * p.sigma,
    "linear": lambda t, p, norm: norm * (1 - t),
    "decreasing": lambda t, p, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t, p, norm: norm * torch.sin(math.pi * t) ** 2,
}
