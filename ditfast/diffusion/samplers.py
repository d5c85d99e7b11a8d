"""DDPM and DDIM sampling. Functions of a ``diffusion`` are methods of `GaussianDiffusion`.

A step reads nothing back from the device and, once the tables are there, copies nothing to it: after one step, the
next can be captured in a CUDA graph.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ditfast.diffusion import checks, equations
from ditfast.diffusion.noise import Generators, noise_like, starting_noise


def p_sample(
    diffusion: Any,
    model: Callable,
    x: torch.Tensor,
    t: torch.Tensor,
    clip_denoised: bool = True,
    denoised_fn: Callable | None = None,
    cond_fn: Callable | None = None,
    model_kwargs: dict | None = None,
    generator: Generators = None,
) -> dict[str, torch.Tensor]:
    """One step of ancestral sampling: x_{t-1} from x_t.

    Args:
        model, clip_denoised, denoised_fn: see `p_mean_variance`.
        x: (B, C, …) noisy samples.
        t: (B,) timesteps.
        cond_fn: see `condition_mean`.
        generator: for the step's noise, see `noise_like`.

    Returns:
        A dict of ``sample`` (B, C, …), in the dtype of x, and ``pred_xstart``.

    Source: Ho et al. 2020, algorithm 2.
    """
    out = diffusion.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
    mean = out["mean"]
    if cond_fn is not None:
        mean = diffusion.condition_mean(cond_fn, out, x, t, model_kwargs)
    sample = mean + _where_noisy(x, t) * torch.exp(0.5 * out["log_variance"]) * noise_like(x, generator)
    return {"sample": sample.to(x.dtype), "pred_xstart": out["pred_xstart"]}


def ddim_sample(
    diffusion: Any,
    model: Callable,
    x: torch.Tensor,
    t: torch.Tensor,
    clip_denoised: bool = True,
    denoised_fn: Callable | None = None,
    cond_fn: Callable | None = None,
    model_kwargs: dict | None = None,
    eta: float = 0.0,
    generator: Generators = None,
) -> dict[str, torch.Tensor]:
    """One step of DDIM: x_{t-1} from x_t. Like `p_sample`; eta = 0 adds no noise, eta = 1 as much as DDPM.

    Source: Song et al. 2021, equation 12.
    """
    checks.eta(eta)
    pred_xstart = _pred_xstart(diffusion, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
    c = diffusion.coefficients(t, x)
    sigma = equations.ddim_sigma(c, eta)
    mean = equations.ddim_mean(c.alphas_cumprod_prev, pred_xstart, equations.eps(c, x, pred_xstart), sigma)
    # drawn even at eta = 0, to match the original's random stream
    sample = mean + _where_noisy(x, t) * sigma * noise_like(x, generator)
    return {"sample": sample.to(x.dtype), "pred_xstart": pred_xstart}


def ddim_reverse_sample(
    diffusion: Any,
    model: Callable,
    x: torch.Tensor,
    t: torch.Tensor,
    clip_denoised: bool = True,
    denoised_fn: Callable | None = None,
    cond_fn: Callable | None = None,
    model_kwargs: dict | None = None,
    eta: float = 0.0,
) -> dict[str, torch.Tensor]:
    """One step of DDIM toward noise, x_{t+1} from x_t, deterministic: encodes a sample. Like `ddim_sample`.

    Raises:
        ValueError: an eta other than 0.

    Source: Song et al. 2021, section 4.3.
    """
    if eta != 0:
        raise ValueError(f"eta must be 0 for the deterministic reverse, got {eta}")
    pred_xstart = _pred_xstart(diffusion, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
    c = diffusion.coefficients(t, x)
    sample = equations.ddim_mean(c.alphas_cumprod_next, pred_xstart, equations.eps(c, x, pred_xstart))
    return {"sample": sample.to(x.dtype), "pred_xstart": pred_xstart}


def p_sample_loop(diffusion: Any, model: Callable, shape: Sequence[int], *args: Any, **options: Any) -> torch.Tensor:
    """The last sample (B, C, …) of `p_sample_loop_progressive`, with the same arguments."""
    return _last(diffusion.p_sample_loop_progressive(model, shape, *args, **options))


def p_sample_loop_progressive(
    diffusion: Any,
    model: Callable,
    shape: Sequence[int],
    noise: torch.Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: Callable | None = None,
    cond_fn: Callable | None = None,
    model_kwargs: dict | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    generator: Generators = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Ancestral sampling from noise, step by step: yields the dict of `p_sample`, T times.

    Args:
        shape: (B, C, …) of the samples.
        noise: the starting noise; drawn from ``generator`` if None.
        device: of the samples; by default that of the noise or of the model's parameters.
        progress: show a progress bar (needs tqdm).
        others: see `p_sample`.
    """
    start = starting_noise(model, shape, noise, device, generator)

    def step(x, t):
        return diffusion.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, generator)

    return _loop(diffusion, step, start, progress)


def ddim_sample_loop(
    diffusion: Any, model: Callable, shape: Sequence[int], *args: Any, **options: Any
) -> torch.Tensor:
    """The last sample (B, C, …) of `ddim_sample_loop_progressive`, with the same arguments."""
    return _last(diffusion.ddim_sample_loop_progressive(model, shape, *args, **options))


def ddim_sample_loop_progressive(
    diffusion: Any,
    model: Callable,
    shape: Sequence[int],
    noise: torch.Tensor | None = None,
    clip_denoised: bool = True,
    denoised_fn: Callable | None = None,
    cond_fn: Callable | None = None,
    model_kwargs: dict | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
    eta: float = 0.0,
    generator: Generators = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """DDIM sampling from noise, step by step. Like `p_sample_loop_progressive`; ``eta`` as in `ddim_sample`."""
    start = starting_noise(model, shape, noise, device, generator)

    def step(x, t):
        return diffusion.ddim_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs, eta, generator)

    return _loop(diffusion, step, start, progress)


def _pred_xstart(diffusion, model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs):
    out = diffusion.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
    if cond_fn is not None:
        out = diffusion.condition_score(cond_fn, out, x, t, model_kwargs)
    return out["pred_xstart"]


def _where_noisy(x, t):
    """(B, 1, …): 0 at t = 0, the last step, which adds no noise; else 1."""
    return (t != 0).to(torch.float32).view(-1, *[1] * (x.dim() - 1))


def _loop(diffusion, step, x, progress):
    for i in with_progress(range(diffusion.num_timesteps - 1, -1, -1), progress):
        t = torch.full((len(x),), i, device=x.device)  # filled on the device: no copy
        with torch.no_grad():
            out = step(x, t)
        yield out
        x = out["sample"]


def _last(steps):
    for out in steps:
        sample = out["sample"]
    return sample


def with_progress(steps: Iterable, progress: bool) -> Iterable:
    """``steps``, with a progress bar if ``progress``."""
    if not progress:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from None
    return tqdm(steps)
