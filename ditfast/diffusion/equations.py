"""The papers' equations. ``c`` holds a batch's coefficients, gathered at the timestep of each sample."""


def x_t(c, x_start, noise):
    """A noisy sample from a clean one: q(x_t | x_0). Source: Ho et al. 2020, equation 4."""
    return c.sqrt_alphas_cumprod * x_start + c.sqrt_one_minus_alphas_cumprod * noise


def x_start(c, x_t, eps):
    """The clean sample that the predicted noise implies. Source: Ho et al. 2020, equation 15."""
    return c.sqrt_recip_alphas_cumprod * x_t - c.sqrt_recipm1_alphas_cumprod * eps


def eps(c, x_t, x_start):
    """The noise that a clean sample implies. Source: Ho et al. 2020, equation 15, solved for the noise."""
    return (c.sqrt_recip_alphas_cumprod * x_t - x_start) / c.sqrt_recipm1_alphas_cumprod


def posterior_mean(c, x_start, x_t):
    """The mean of q(x_{t-1} | x_t, x_0). Source: Ho et al. 2020, equation 7."""
    return c.posterior_mean_coef1 * x_start + c.posterior_mean_coef2 * x_t


def learned_log_variance(c, v):
    """Log variance between the posterior's (v = -1) and beta's (v = 1).

    Source: Nichol & Dhariwal 2021, equation 15.
    """
    fraction = (v + 1) / 2
    return fraction * c.log_betas + (1 - fraction) * c.posterior_log_variance_clipped


def ddim_sigma(c, eta):
    """The noise that a DDIM step adds: none at eta = 0, DDPM's at 1. Source: Song et al. 2021, equation 16."""
    before, now = c.alphas_cumprod_prev, c.alphas_cumprod
    return eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()


def ddim_mean(alphas_cumprod, x_start, eps, sigma=0.0):
    """A sample's mean at another noise level, along the predicted noise. Source: Song et al. 2021, equation 12."""
    return x_start * alphas_cumprod.sqrt() + (1 - alphas_cumprod - sigma**2).sqrt() * eps
