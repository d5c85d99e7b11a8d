"""Noise schedules and the tables computed from them, in float64 on the host."""

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ditfast.suggest import did_you_mean

MOST_STEPS = 10**6  # more than any process needs; the tables are in memory
SCHEDULES = ("linear", "squaredcos_cap_v2")
LEAST_SIGNAL = -5.1  # log(alpha / sigma) where sampling starts, as in DPM-Solver's code (Lu et al. 2022)


class Tables(NamedTuple):
    """Each quantity per timestep, an array (T,), or gathered at a batch's timesteps, a tensor (B, 1, …)."""

    betas: Any
    alphas_cumprod: Any
    alphas_cumprod_prev: Any
    alphas_cumprod_next: Any
    sqrt_alphas_cumprod: Any
    sqrt_one_minus_alphas_cumprod: Any
    log_one_minus_alphas_cumprod: Any
    sqrt_recip_alphas_cumprod: Any
    sqrt_recipm1_alphas_cumprod: Any
    posterior_variance: Any
    posterior_log_variance_clipped: Any
    posterior_mean_coef1: Any
    posterior_mean_coef2: Any
    log_betas: Any
    large_variance: Any
    log_large_variance: Any


def get_named_beta_schedule(name: str, steps: int) -> np.ndarray:
    """The variances (T,) of the forward process's steps, for ``"linear"`` or ``"squaredcos_cap_v2"``.

    Raises:
        ValueError: an unknown name, fewer than one step, or so few that a linear variance would reach 1.

    Source: Ho et al. 2020, section 4 (linear); Nichol & Dhariwal 2021, equation 17 (squared cosine).
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"diffusion_steps must be a positive integer, got {steps!r}")
    if steps > MOST_STEPS:
        raise ValueError(f"diffusion_steps must be at most {MOST_STEPS}, got {steps}")
    if name == "linear":
        if steps <= 20:
            raise ValueError(f"diffusion_steps must be above 20 for noise_schedule 'linear', got {steps}")
        return np.linspace(0.1 / steps, 20 / steps, steps)  # 1e-4 to 0.02 for T = 1000
    if name == "squaredcos_cap_v2":
        time = np.arange(steps + 1) / steps
        alphas_cumprod = np.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2  # (T + 1,)
        return np.minimum(1 - alphas_cumprod[1:] / alphas_cumprod[:-1], 0.999)
    raise ValueError(
        f"noise_schedule must be one of {', '.join(SCHEDULES)}, got {name!r}{did_you_mean(name, SCHEDULES)}"
    )


def check_betas(betas: npt.ArrayLike) -> np.ndarray:
    """Convert ``betas`` to a float64 array (T,) of values strictly between 0 and 1.

    Raises:
        ValueError: another shape, or a value out of range, including NaN.
    """
    betas = np.array(betas, dtype=np.float64)
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"betas must have shape (T,) with T >= 1, got {betas.shape}")
    wrong = betas[~((betas > 0) & (betas < 1))]
    if len(wrong):
        raise ValueError(f"betas must be strictly between 0 and 1, got {wrong[0]}")
    return betas


def noisiest_step(betas: np.ndarray) -> int:
    """The last step with enough signal, where sampling must start if x_0 is not clamped.

    Computing x_0 from the predicted noise multiplies the prediction error by sigma / alpha. The linear schedule ends
    at 157; the squared cosine has 160 at step 995 of 1000, then 214, 321, 642, 20291.
    """
    alphas_cumprod = np.cumprod(1 - betas)  # (T,)
    signal = 0.5 * np.log(alphas_cumprod / (1 - alphas_cumprod))
    return int(np.flatnonzero(signal >= LEAST_SIGNAL).max(initial=0))


def make_tables(betas: np.ndarray) -> Tables:
    """Compute all tables from the variances (T,).

    Source: Ho et al. 2020, equations 4 and 7.
    """
    alphas_cumprod = np.cumprod(1 - betas)
    previous = np.append(1.0, alphas_cumprod[:-1])
    posterior_variance = betas * (1 - previous) / (1 - alphas_cumprod)
    # at t = 0 the posterior is a point, log 0: the variance of t = 1 stands in, or beta where that is the only step
    first = posterior_variance[1:2] if len(betas) > 1 else betas
    clipped = np.append(first, posterior_variance[1:])
    large = np.append(first, betas[1:])
    return Tables(
        betas=betas,
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=previous,
        alphas_cumprod_next=np.append(alphas_cumprod[1:], 0.0),
        sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
        sqrt_one_minus_alphas_cumprod=np.sqrt(1 - alphas_cumprod),
        log_one_minus_alphas_cumprod=np.log(1 - alphas_cumprod),
        sqrt_recip_alphas_cumprod=np.sqrt(1 / alphas_cumprod),
        sqrt_recipm1_alphas_cumprod=np.sqrt(1 / alphas_cumprod - 1),
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=np.log(clipped),
        posterior_mean_coef1=betas * np.sqrt(previous) / (1 - alphas_cumprod),
        posterior_mean_coef2=(1 - previous) * np.sqrt(1 - betas) / (1 - alphas_cumprod),
        log_betas=np.log(betas),
        large_variance=large,
        log_large_variance=np.log(large),
    )
