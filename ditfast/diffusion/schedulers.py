"""Schedulers of diffusers (DPM-Solver++, UniPC, Euler, …) as samplers. Only `make_scheduler` imports diffusers."""

import inspect

import torch

from ditfast.diffusion import checks
from ditfast.diffusion.kinds import ModelMeanType
from ditfast.diffusion.noise import starting_noise
from ditfast.diffusion.samplers import with_progress
from ditfast.suggest import did_you_mean

NAMES = {
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

# what a scheduler for a `GaussianDiffusion` has; those of flow matching and of other noise levels do not
REQUIRED = {"trained_betas", "prediction_type"}


def make_scheduler(name, diffusion, **options):
    """A scheduler of diffusers for models trained with ``diffusion``: the full process's betas, no clipping.

    Args:
        name: one of `NAMES`, or the name of a class of diffusers that takes what is `REQUIRED`.
        diffusion: a `GaussianDiffusion`; which of its steps are kept does not matter here.
        options: more arguments of the class, such as ``use_karras_sigmas=True``.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: an unknown name, or a class that is not built on betas.
    """
    class_name, preset = NAMES.get(name, (name, {}))
    scheduler_class = _find_scheduler(class_name)
    known = inspect.signature(scheduler_class.__init__).parameters
    if not known.keys() >= REQUIRED:
        raise ValueError(f"scheduler must be of a class that takes {' and '.join(sorted(REQUIRED))}, got {name!r}")
    predicts = "sample" if diffusion.model_mean_type is ModelMeanType.START_X else "epsilon"
    wanted = {
        "num_train_timesteps": diffusion.original_num_steps,
        "trained_betas": diffusion.original_betas.tolist(),
        "prediction_type": predicts,
        "clip_sample": False,
        "timestep_spacing": "trailing",  # starts at the last step, from pure noise, in all of them
    }
    return scheduler_class(**{k: v for k, v in wanted.items() if k in known} | preset | options)


def _find_scheduler(class_name):
    try:
        import diffusers
    except ImportError:
        raise ImportError("make_scheduler needs diffusers: pip install 'ditfast[train]'") from None
    if class_name.endswith(("Scheduler", "Discrete")) and hasattr(diffusers, class_name):
        return getattr(diffusers, class_name)
    classes = [each for each in dir(diffusers) if each.endswith("Scheduler")]
    hint = did_you_mean(class_name, [*NAMES, *classes])
    raise ValueError(
        f"scheduler must be one of {', '.join(NAMES)}, or a class of diffusers, got {class_name!r}{hint}"
    )


@torch.no_grad()
def sample_with_scheduler(
    model,
    scheduler,
    shape,
    steps,
    noise=None,
    model_kwargs=None,
    device=None,
    generator=None,
    learn_sigma=True,
    progress=False,
    **step_options,
):
    """Samples (B, C, …) from noise, the steps taken by a scheduler of diffusers.

    Args:
        model: called as ``model(x, t, **model_kwargs)``, t in the full process, maybe fractional.
        scheduler: of diffusers, on the betas that the model was trained with; see `make_scheduler`.
        shape, noise, device, generator, progress: see `p_sample_loop_progressive`.
        steps: how many; some schedulers call the model twice in a step.
        learn_sigma: the model's output is (B, 2C, …): noise, then variance, which only a scheduler with
            ``variance_type="learned_range"`` is given.
        step_options: more arguments of ``scheduler.step``, such as ``eta``.

    Raises:
        ValueError: a scheduler for another kind of model, or steps, noise or an output of the model that do not fit.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive integer, got {steps!r}")
    _check_fits(scheduler)
    x = starting_noise(model, shape, noise, device, generator)
    # timesteps stay on the host: indexing by one on the device would make every step wait for it
    scheduler.set_timesteps(steps, device="cpu")
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    x = x * scheduler.init_noise_sigma
    device_timesteps = scheduler.timesteps.to(x.device)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_options["generator"] = generator
    for i, t in enumerate(with_progress(scheduler.timesteps, progress)):
        scaled = scheduler.scale_model_input(x, t)
        output = model(scaled, device_timesteps[i].expand(len(x)), **(model_kwargs or {}))
        checks.model_output(output, x, learn_sigma)
        if not _wants_variance(scheduler):
            output = output[:, : x.shape[1]]
        x = scheduler.step(output, t, x, **step_options).prev_sample
    return x


def _check_fits(scheduler):
    config = getattr(scheduler, "config", {})
    if not config.keys() >= REQUIRED:
        needs, got = " and ".join(sorted(REQUIRED)), type(scheduler).__name__
        raise ValueError(f"scheduler must be of a class that takes {needs}, got {got}")
    if config["prediction_type"] not in ("epsilon", "sample"):
        raise ValueError(
            f"scheduler's prediction_type must be 'epsilon' or 'sample', got {config['prediction_type']!r}"
        )


def _wants_variance(scheduler):
    return scheduler.config.get("variance_type") in ("learned", "learned_range")
