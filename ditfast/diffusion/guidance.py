"""Guidance by a classifier's gradient: ``cond_fn(x, t, **model_kwargs)`` returns that of log p(y | x_t) for x_t.

What takes a diffusion here, but for `_gradient`, is a method of `GaussianDiffusion`.
"""

from ditfast.diffusion import equations


def _gradient(diffusion, cond_fn, x, t, model_kwargs):
    return cond_fn(x, diffusion.original_timesteps(t), **(model_kwargs or {}))


def condition_mean(diffusion, cond_fn, p_mean_var, x, t, model_kwargs=None):
    """The mean of `p_mean_variance`, moved along the gradient. Source: Dhariwal & Nichol 2021, algorithm 1."""
    gradient = _gradient(diffusion, cond_fn, x, t, model_kwargs)
    return p_mean_var["mean"] + p_mean_var["variance"] * gradient


def condition_score(diffusion, cond_fn, p_mean_var, x, t, model_kwargs=None):
    """A copy of `p_mean_variance`'s dict for the noise moved along the gradient.

    Source: Dhariwal & Nichol 2021, algorithm 2; Song et al. 2021, "Score-Based Generative Modeling through SDEs".
    """
    c = diffusion.coefficients(t, x)
    gradient = _gradient(diffusion, cond_fn, x, t, model_kwargs)
    eps = equations.eps(c, x, p_mean_var["pred_xstart"]) - c.sqrt_one_minus_alphas_cumprod * gradient
    pred_xstart = equations.x_start(c, x, eps)
    return {**p_mean_var, "pred_xstart": pred_xstart, "mean": equations.posterior_mean(c, pred_xstart, x)}
