"""Training losses and the variational bound. Functions of a ``diffusion`` are methods of `GaussianDiffusion`."""

import math
from collections.abc import Callable
from typing import Any

import torch

from ditfast.diffusion import checks, equations
from ditfast.diffusion.diffusion_utils import discretized_gaussian_log_likelihood, normal_kl
from ditfast.diffusion.kinds import LossType, ModelMeanType, ModelVarType
from ditfast.diffusion.noise import Generators, noise_like


def mean_flat(x: torch.Tensor) -> torch.Tensor:
    """The mean over all dimensions but the first: (B, …) -> (B,)."""
    return x.flatten(1).mean(1)


def _bound(x_start, x_t, t, truth, prediction):
    """One term of the variational bound, in bits per dimension: (B,). Source: Ho et al. 2020, equation 5."""
    true_mean, _, true_log_variance = truth
    mean, log_variance = prediction["mean"], prediction["log_variance"]
    kl = mean_flat(normal_kl(true_mean, true_log_variance, mean, log_variance))
    nll = -mean_flat(discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_variance))
    return torch.where(t == 0, nll, kl) / math.log(2)


def vb_terms_bpd(
    diffusion: Any,
    model: Callable,
    x_start: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    clip_denoised: bool = True,
    model_kwargs: dict | None = None,
) -> dict[str, torch.Tensor]:
    """One term of the variational bound per sample, in bits per dimension.

    Returns:
        A dict of ``output`` (B,), the negative log likelihood of x_start at t = 0, else a KL divergence; and
        ``pred_xstart`` (B, C, …).
    """
    prediction = diffusion.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
    truth = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    return {"output": _bound(x_start, x_t, t, truth, prediction), "pred_xstart": prediction["pred_xstart"]}


def training_losses(
    diffusion: Any,
    model: Callable,
    x_start: torch.Tensor,
    t: torch.Tensor,
    model_kwargs: dict | None = None,
    noise: torch.Tensor | None = None,
    generator: Generators = None,
) -> dict[str, torch.Tensor]:
    """The training loss of each sample.

    Args:
        model: see `p_mean_variance`.
        x_start: (B, C, …) clean samples.
        t: (B,) timesteps.
        noise: (B, C, …); drawn from ``generator`` if None.

    Returns:
        A dict of ``loss`` (B,) and its terms: ``mse``, and ``vb`` for a learned variance.

    Source: Ho et al. 2020, equation 14; Nichol & Dhariwal 2021, equation 16.
    """
    checks.floating("x_start", x_start)
    if noise is None:
        noise = noise_like(x_start, generator)
    x_t = diffusion.q_sample(x_start, t, noise)
    if diffusion.loss_type in (LossType.KL, LossType.RESCALED_KL):
        bound = vb_terms_bpd(diffusion, model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)
        weight = diffusion.num_timesteps if diffusion.loss_type is LossType.RESCALED_KL else 1
        return {"loss": weight * bound["output"]}
    output, _ = diffusion.call_model(model, x_t, t, model_kwargs)
    target = noise if diffusion.model_mean_type is ModelMeanType.EPSILON else x_start
    mse = mean_flat((target - output[:, : x_start.shape[1]]) ** 2)
    if diffusion.model_var_type is not ModelVarType.LEARNED_RANGE:
        return {"mse": mse, "loss": mse}
    vb = _variance_bound(diffusion, output, x_start, x_t, t)
    return {"mse": mse, "vb": vb, "loss": mse + vb}


def _variance_bound(diffusion, output, x_start, x_t, t):
    """The bound (B,) as a loss of the variance alone: the mean gets no gradient."""
    mean, v = output.chunk(2, dim=1)
    frozen = torch.cat([mean.detach(), v], dim=1)  # (B, 2C, …)
    prediction = diffusion.read_output(frozen, x_t, t, clip_denoised=False)
    truth = diffusion.q_posterior_mean_variance(x_start, x_t, t)
    weight = diffusion.num_timesteps / 1000 if diffusion.loss_type is LossType.RESCALED_MSE else 1
    return weight * _bound(x_start, x_t, t, truth, prediction)


def _prior_bpd(diffusion, x_start):
    """The KL divergence of q(x_T | x_0) from the standard normal, in bits per dimension: (B,)."""
    t = torch.full((len(x_start),), diffusion.num_timesteps - 1, device=x_start.device)
    mean, _, log_variance = diffusion.q_mean_variance(x_start, t)
    zero = torch.zeros_like(mean)
    return mean_flat(normal_kl(mean, log_variance, zero, zero)) / math.log(2)


@torch.no_grad()
def calc_bpd_loop(
    diffusion: Any,
    model: Callable,
    x_start: torch.Tensor,
    clip_denoised: bool = True,
    model_kwargs: dict | None = None,
    generator: Generators = None,
) -> dict[str, torch.Tensor]:
    """The full variational bound, in bits per dimension, and its terms.

    Returns:
        A dict of ``total_bpd`` and ``prior_bpd`` (B,), and, each (B, T) from t = T - 1 down to 0: ``vb``, the terms
        of the bound; ``xstart_mse`` and ``mse``, the squared errors of the predicted x_0 and noise.

    Source: Ho et al. 2020, equation 5.
    """
    checks.floating("x_start", x_start)
    terms = []
    for step in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_start),), step, device=x_start.device)
        noise = noise_like(x_start, generator)
        x_t = diffusion.q_sample(x_start, t, noise)
        bound = vb_terms_bpd(diffusion, model, x_start, x_t, t, clip_denoised, model_kwargs)
        eps = equations.eps(diffusion.coefficients(t, x_t), x_t, bound["pred_xstart"])
        xstart_mse = mean_flat((bound["pred_xstart"] - x_start) ** 2)
        terms.append((bound["output"], xstart_mse, mean_flat((eps - noise) ** 2)))
    vb, xstart_mse, mse = (torch.stack(column, dim=1) for column in zip(*terms, strict=True))  # (B, T) each
    prior_bpd = _prior_bpd(diffusion, x_start)
    return {
        "total_bpd": vb.sum(1) + prior_bpd,
        "prior_bpd": prior_bpd,
        "vb": vb,
        "xstart_mse": xstart_mse,
        "mse": mse,
    }
