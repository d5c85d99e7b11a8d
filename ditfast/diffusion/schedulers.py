"""Schedulers of diffusers (DPM-Solver++, UniPC, Euler, …) as samplers. Only `make_scheduler` imports diffusers."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ditfast.diffusion import checks
from ditfast.diffusion.gaussian_diffusion import GaussianDiffusion
from ditfast.diffusion.kinds import ModelMeanType
from ditfast.diffusion.noise import Generators, starting_noise
from ditfast.diffusion.samplers import with_progress
from ditfast.diffusion.schedule import noisiest_step
from ditfast.suggest import did_you_mean

NAMES: dict[str, tuple[str, dict]] = {  # class in diffusers, preset options
    "ddim": ("DDIMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
}

# parameters of a scheduler for a `GaussianDiffusion`; flow matching and other noise levels lack them
REQUIRED = {"trained_betas", "prediction_type"}
DISTILLED = "original_inference_steps"  # a parameter only of schedulers for distilled models
STRIDED = ("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler")  # each of their steps goes T // steps back
# with fewer steps, the demo's digits are illegible
LEAST_STEPS = {"DDIMScheduler": 2, "DDIMParallelScheduler": 2, "PNDMScheduler": 4, "SASolverScheduler": 10}
LEAST_STEPS_OF_ORDER_2 = 8


def make_scheduler(name: str, diffusion: GaussianDiffusion, **options: Any) -> Any:
    """Make a scheduler of diffusers for models trained with ``diffusion``: the full process's betas, no clipping.

    It starts at `noisiest_step`, or, if its steps have equal lengths, one length before the end, as DDIM does.

    Args:
        name: one of `NAMES`, or a class of diffusers with the `REQUIRED` parameters.
        diffusion: the process; its respacing does not matter.
        options: further arguments of the class, such as ``use_karras_sigmas=True``.

    Raises:
        ImportError: diffusers, or another package that the class needs, is not installed.
        ValueError: an unknown name, or a class that cannot use these betas.
    """
    if not isinstance(name, str):
        raise TypeError(f"scheduler must be a name, got {name!r}")
    class_name, preset = NAMES.get(name, (name, {}))
    scheduler_class = _find_scheduler(class_name)
    known = inspect.signature(scheduler_class.__init__).parameters
    _check_parameters(known, repr(name))
    predicts = "sample" if diffusion.model_mean_type is ModelMeanType.START_X else "epsilon"
    strided = class_name in STRIDED
    betas = diffusion.original_betas
    betas = betas if strided else betas[: noisiest_step(betas) + 1]
    wanted = {
        "num_train_timesteps": len(betas),
        "trained_betas": betas.tolist(),
        "prediction_type": predicts,
        "clip_sample": False,
        "timestep_spacing": "leading" if strided else "trailing",
        # methods that call the model twice per step are far off over an even first step from pure noise
        "use_karras_sigmas": scheduler_class.order == 2,
    }
    with torch.device("cpu"):  # whatever the default device: the host reads its tables
        scheduler = scheduler_class(**{k: v for k, v in wanted.items() if k in known} | preset | options)
    if not np.allclose(scheduler.alphas_cumprod, np.cumprod(1 - betas), rtol=1e-3, atol=0):
        raise ValueError(f"scheduler must use the betas it is given, got {name!r}, which changes them")
    return scheduler


def class_names() -> list[str]:
    """The scheduler classes of diffusers, also those that `make_scheduler` cannot use.

    Raises:
        ImportError: diffusers is not installed.
    """
    return [name for name in dir(_diffusers()) if name.endswith("Scheduler")]


def _diffusers():
    try:
        import diffusers
    except ImportError:
        raise ImportError("make_scheduler needs diffusers: pip install 'ditfast[sample]'") from None
    return diffusers


def _find_scheduler(class_name):
    known = class_names()
    if class_name not in known:
        hint = did_you_mean(class_name, [*NAMES, *known])
        raise ValueError(
            f"scheduler must be one of {', '.join(NAMES)}, or a class in diffusers, got {class_name!r}{hint}"
        )
    found = getattr(_diffusers(), class_name)
    if needs := getattr(found, "_backends", None):  # diffusers' dummy class for missing packages
        raise ImportError(f"{class_name} needs {' and '.join(needs)}")
    return found


@torch.no_grad()
def sample_with_scheduler(
    model: Callable[..., torch.Tensor],
    scheduler: Any,
    shape: Sequence[int],
    steps: int,
    noise: torch.Tensor | None = None,
    model_kwargs: dict | None = None,
    device: str | torch.device | None = None,
    generator: Generators = None,
    learn_sigma: bool = True,
    progress: bool = False,
    clip_denoised: bool = False,
    **step_options: Any,
) -> torch.Tensor:
    """Samples (B, C, …) from noise, with a scheduler of diffusers.

    Args:
        model: called as ``model(x, t, **model_kwargs)``, with t in the full process, possibly fractional.
        scheduler: of diffusers, with the betas of the model's training; see `make_scheduler`.
        shape, noise, device, generator, progress: see `p_sample_loop_progressive`.
        steps: number of steps; some schedulers call the model twice per step.
        learn_sigma: the model's output is (B, 2C, …): noise, then variance, which is only passed to a scheduler with
            ``variance_type="learned_range"``.
        clip_denoised: clamp the prediction of x_0 to [-1, 1] before it reaches the scheduler.
        step_options: further arguments of ``scheduler.step``, such as ``eta``.

    Raises:
        ValueError: a scheduler for another kind of model, or steps, noise or a model output that do not fit.
    """
    set_steps(scheduler, steps)
    x = starting_noise(model, shape, noise, device, generator)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = x * scheduler.init_noise_sigma
    device_timesteps = scheduler.timesteps.to(x.device)
    noise_ratios = _noise_ratios(scheduler)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = generator
    for i, t in enumerate(with_progress(scheduler.timesteps, progress)):
        scaled = scheduler.scale_model_input(x, t)
        output = model(scaled, device_timesteps[i].expand(len(x)), **(model_kwargs or {}))
        checks.model_output(output, x, learn_sigma)
        if not _wants_variance(scheduler):
            output = output[:, : x.shape[1]]
        if clip_denoised:
            output = _clip(output, scaled, noise_ratios[i], scheduler.config["prediction_type"])
        x = scheduler.step(output, t, x, **step_options).prev_sample
    return x


def set_steps(scheduler: Any, steps: int) -> None:
    """Set the scheduler's timesteps on the host, since indexing by device timesteps would synchronize every step.

    Raises:
        ValueError: a scheduler for another kind of model, or a number of steps that it cannot take.
    """
    _check_fits(scheduler)
    _check_steps(scheduler, steps)
    with torch.device("cpu"):  # some schedulers ignore the argument
        scheduler.set_timesteps(steps, device="cpu")
    if scheduler.timesteps[0] < scheduler.timesteps[-1]:
        got = type(scheduler).__name__
        raise ValueError(f"scheduler must go from noise to samples, got {got}, which goes the other way")


def _check_steps(scheduler, steps):
    name, most = type(scheduler).__name__, scheduler.config["num_train_timesteps"]
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    least = LEAST_STEPS_OF_ORDER_2 if scheduler.order == 2 else LEAST_STEPS.get(name, 1)
    if name in STRIDED:
        fitting = [n for n in range(least, most + 1) if most % n == 0]
        nearest = sorted(sorted(fitting, key=lambda n: abs(n - steps))[:2])
        rule = f"divide {most} and be at least {least} for {name}, as {' and '.join(map(str, nearest))} do"
    else:
        fitting = [*range(least, most + 1)]
        rule = f"be from {least} to {most} for {name} and this noise schedule"
    if steps not in fitting:
        raise ValueError(f"steps must {rule}, got {steps}")


def _noise_ratios(scheduler):
    """sigma / alpha at each timestep, with a log-linear interpolation, as in the schedulers."""
    alphas_cumprod = np.asarray(scheduler.alphas_cumprod, dtype=np.float64)  # (T,)
    log_ratios = 0.5 * np.log(1 / alphas_cumprod - 1)
    return np.exp(np.interp(scheduler.timesteps, np.arange(len(log_ratios)), log_ratios)).tolist()


def _clip(output, x, noise_ratio, prediction_type):
    """The output (B, C or 2C, …) for x (B, C, …), with its prediction of x_0 clamped to [-1, 1]."""
    prediction, *variance = output.split(x.shape[1], dim=1)
    if prediction_type == "sample":
        return torch.cat([prediction.clamp(-1, 1), *variance], dim=1)
    # in float32: near pure noise the ratio is large, and x_0 the difference of two large numbers
    x_start = (1 + noise_ratio**2) ** 0.5 * x.float() - noise_ratio * prediction.float()
    beyond = x_start - x_start.clamp(-1, 1)
    return torch.cat([(prediction + beyond / noise_ratio).to(output.dtype), *variance], dim=1)


def _check_parameters(parameters, got):
    if not parameters.keys() >= REQUIRED:
        raise ValueError(f"scheduler's class must have {' and '.join(sorted(REQUIRED))}, got {got}")
    if DISTILLED in parameters:
        raise ValueError(f"scheduler must not be for distilled models, which have {DISTILLED}, got {got}")


def _check_fits(scheduler):
    config = getattr(scheduler, "config", {})
    _check_parameters(config, type(scheduler).__name__)
    if config["prediction_type"] not in ("epsilon", "sample"):
        raise ValueError(
            f"scheduler's prediction_type must be 'epsilon' or 'sample', got {config['prediction_type']!r}"
        )


def _wants_variance(scheduler):
    return scheduler.config.get("variance_type") in ("learned", "learned_range")
