"""Flow schedulers of diffusers as samplers of a model of velocities on the linear path."""

import inspect

import torch

from ditfast.diffusion.noise import starting_noise
from ditfast.flow import checks
from ditfast.flow.adapters import diffusers_flow

NAMES = {  # the class in diffusers, and what makes it one for flows
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow-dpm++": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "flow-unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}


def make_scheduler(name: str, time_shift: float = 1.0):
    """A flow scheduler of diffusers.

    Args:
        name: one of `NAMES`.
        time_shift: see `shift_times`.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: an unknown name, or a shift out of range.
    """
    checks.choice("scheduler", name, NAMES)
    checks.number("time_shift", time_shift, 1e-3, 1e3)
    try:
        import diffusers
    except ImportError:
        raise ImportError("make_scheduler needs diffusers: pip install 'ditfast[sample]'") from None
    class_name, options = NAMES[name]
    scheduler_class = getattr(diffusers, class_name)
    shift = "shift" if "shift" in inspect.signature(scheduler_class.__init__).parameters else "flow_shift"
    with torch.device("cpu"):  # whatever the default device: its tables are read on the host
        return scheduler_class(**options, **{shift: time_shift})


def set_steps(scheduler, steps: int) -> list[float]:
    """Set the steps of a flow scheduler; the times, 0 noise and 1 data, of its calls of the model.

    Raises:
        ValueError: no flow scheduler, or steps that it cannot take.
    """
    config = getattr(scheduler, "config", {})
    if "Flow" not in type(scheduler).__name__ and not config.get("use_flow_sigmas"):
        raise ValueError(f"scheduler must be one of diffusers' for flows, got {type(scheduler).__name__}")
    checks.whole("steps", steps, 1)
    with torch.device("cpu"):
        scheduler.set_timesteps(steps, device="cpu")
    return [1 - t / 1000 for t in scheduler.timesteps.tolist()]


@torch.no_grad()
def sample_with_scheduler(model, scheduler, shape, steps, noise=None, model_kwargs=None, device=None, generator=None):
    """Samples (B, C, …) from noise, the steps taken by a flow scheduler of diffusers.

    Args:
        model: as all of this package's: t from 0, noise, to 1, data.
        scheduler: see `make_scheduler`.
        shape, noise, device, generator: see `ditfast.diffusion`'s `p_sample_loop_progressive`.

    Raises:
        ValueError: a scheduler for another kind of model, or steps, noise or an output of the model that do not fit.
    """
    set_steps(scheduler, steps)
    x = starting_noise(model, shape, noise, device, generator)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    predict, timesteps = diffusers_flow(model), scheduler.timesteps.to(x.device)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": generator} if takes_generator else {}
    for i, t in enumerate(scheduler.timesteps):
        output = checks.model_output(predict(x, timesteps[i].expand(len(x)), **(model_kwargs or {})), x)
        x = scheduler.step(output, t, x, **options).prev_sample
    return x
