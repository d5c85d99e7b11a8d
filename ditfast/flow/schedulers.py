"""Flow schedulers of diffusers as samplers for models of velocities on the linear path."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ditfast.diffusion.noise import Generators, starting_noise
from ditfast.flow import checks
from ditfast.flow.adapters import diffusers_flow

NAMES: dict[str, tuple[str, dict]] = {  # class in diffusers, and the options that make it a flow scheduler
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "flow-heun": ("FlowMatchHeunDiscreteScheduler", {}),
    "flow-dpm++": ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    "flow-unipc": ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
}


def make_scheduler(name: str, time_shift: float = 1.0) -> Any:
    """Make a flow scheduler of diffusers.

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
    with torch.device("cpu"):  # whatever the default device: the host reads its tables
        return scheduler_class(**options, **{shift: time_shift})


def set_steps(scheduler: Any, steps: int) -> list[float]:
    """Set a flow scheduler's steps, and return the times of its model calls, from 0, noise, to 1, data.

    Raises:
        ValueError: another kind of scheduler, or an invalid number of steps.
    """
    config = getattr(scheduler, "config", {})
    if "Flow" not in type(scheduler).__name__ and not config.get("use_flow_sigmas"):
        raise ValueError(f"scheduler must be a flow scheduler of diffusers, got {type(scheduler).__name__}")
    checks.integer("steps", steps, 1)
    with torch.device("cpu"):
        scheduler.set_timesteps(steps, device="cpu")
    return [1 - t / 1000 for t in scheduler.timesteps.tolist()]


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
) -> torch.Tensor:
    """Samples (B, C, …) from noise, with a flow scheduler of diffusers.

    Args:
        model: in this package's convention, t from 0, noise, to 1, data.
        scheduler: see `make_scheduler`.
        shape, noise, device, generator: see `p_sample_loop_progressive` in `ditfast.diffusion`.

    Raises:
        ValueError: a scheduler for another kind of model, or steps, noise or a model output that do not fit.
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
