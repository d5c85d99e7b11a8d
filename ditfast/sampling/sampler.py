"""From noise to samples: the steps, the guidance, the precision."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from ditfast.diffusion import create_diffusion
from ditfast.diffusion.schedule import noisiest_step
from ditfast.diffusion.schedulers import NAMES, class_names, make_scheduler, sample_with_scheduler, set_steps
from ditfast.models.dit import DiT
from ditfast.models.limits import check_number
from ditfast.sampling import SampleError
from ditfast.sampling.engine import Engine
from ditfast.sampling.flow import FlowSampler
from ditfast.sampling.start import Start
from ditfast.suggest import did_you_mean

OWN = {"ddpm": "{}", "ddim": "ddim{}"}  # this package's samplers -> their timestep_respacing
SAMPLERS = (*OWN, *(name for name in NAMES if name not in OWN))


class Sampler:
    """A diffusion sampling loop.

    Args:
        name: one of `SAMPLERS`, or a scheduler class in diffusers.
        steps: number of steps.
        learn_sigma: the model also predicts a variance.
        clip: clamp predictions of the clean sample to [-1, 1]; if false, start at `noisiest_step`.
        noise_schedule: the model's training schedule, see `create_diffusion`.

    Attributes:
        timesteps: the timestep of each model call.
        times: the same as a fraction of the full process, from 0, clean, to almost 1, noise.
        made_for: what a model's ``sampling`` must record, if anything, for `sample` to take it.

    Raises:
        SampleError: an unknown name, steps that do not fit it, or diffusers is needed but missing.
    """

    def __init__(self, name: str, steps: int, learn_sigma: bool, clip: bool, noise_schedule: str = "linear"):
        self.name, self.steps, self.learn_sigma, self.clip = name, steps, learn_sigma, clip
        self.made_for = {"objective": "diffusion", "noise_schedule": noise_schedule}
        _check_name(name)
        try:
            make = partial(create_diffusion, noise_schedule=noise_schedule, learn_sigma=learn_sigma)
            self.diffusion = make("")
            if name in OWN:
                last = None if clip else noisiest_step(self.diffusion.original_betas)
                most = self.diffusion.original_num_steps if last is None else last + 1
                if not 1 <= steps <= most:
                    raise SampleError(f"steps must be in [1, {most}] for {name}, got {steps}")
                self.diffusion = make(OWN[name].format(steps), last_step=last)
            self.scheduler = None if name in OWN else make_scheduler(name, self.diffusion)
            timesteps = self._timesteps()
        except (ValueError, ImportError) as error:
            raise SampleError(str(error)) from error
        self.timesteps = [float(t) for t in timesteps]
        self.times = [t / self.diffusion.original_num_steps for t in self.timesteps]

    def _timesteps(self):
        if self.scheduler is None:
            return self.diffusion.timestep_map[::-1]
        set_steps(self.scheduler, self.steps)
        return self.scheduler.timesteps.tolist()

    def __call__(
        self, model: Callable[..., torch.Tensor], noise: torch.Tensor, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """Samples (B, C, S, S) from noise of that shape, with one generator per sample for the steps."""
        shared: dict[str, Any] = {"noise": noise, "generator": generators, "clip_denoised": self.clip}
        if self.scheduler is not None:
            shared["learn_sigma"] = self.learn_sigma
            return sample_with_scheduler(model, self.scheduler, noise.shape, self.steps, **shared)
        loop = {"ddpm": self.diffusion.p_sample_loop, "ddim": self.diffusion.ddim_sample_loop}[self.name]
        return loop(model, noise.shape, **shared)


def _check_name(name):
    if name not in SAMPLERS and name not in (classes := class_names()):
        hint = did_you_mean(name, [*SAMPLERS, *classes])
        rule = f"one of {', '.join(SAMPLERS)}, or a scheduler class in diffusers, for a diffusion model"
        raise SampleError(f"name must be {rule}, got {name!r}{hint}")


class Guidance(NamedTuple):
    """Classifier-free guidance of the first ``channels`` by ``scale``, at times in [``low``, ``high``].

    The scale is one number for all samples. A loop of your own can give `DiT.forward_with_cfg` one per sample.
    """

    scale: float
    low: float
    high: float
    channels: int

    def applies_at(self, time: float) -> bool:
        return self.scale > 1 and self.low <= time <= self.high


def with_guidance(
    model: DiT | Engine,
    labels: torch.Tensor,
    guidance: Guidance,
    times: Iterable[float],
    tick: Callable[[torch.Tensor], object] = lambda x: None,
) -> Callable[..., torch.Tensor]:
    """Wrap a model for samplers: ``predict(x, t)``, or ``predict(x, t, r=r)`` for a model of average velocities.

    Only guided calls double the batch. Both halves get the same x, so that samplers see, and draw noise for, one
    half.

    Args:
        labels: (B,).
        times: the time of each call. From the host, since reading t would synchronize with the device.
        tick: called with x once per model call.
    """
    upcoming = iter(times)
    nulls = torch.full_like(labels, model.y_embedder.num_classes)
    both = torch.cat([labels, nulls])

    def predict(x, t, **second_time):
        tick(x)
        if not guidance.applies_at(next(upcoming)):
            return model(x, t, labels, **second_time).float()
        x2, t2, r2 = x.repeat(2, 1, 1, 1), t.repeat(2), {name: r.repeat(2) for name, r in second_time.items()}
        return model.forward_with_cfg(x2, t2, both, guidance.scale, guidance.channels, **r2)[: len(x)].float()

    return predict


def sample(
    model: DiT | Engine,
    sampler: Sampler | FlowSampler,
    guidance: Guidance,
    starts: Sequence[Start],
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    tick: Callable[[torch.Tensor], object] = lambda x: None,
    *,
    allow_mismatch: bool = False,
) -> torch.Tensor:
    """Samples (B, C, S, S) in float32, one per `Start`.

    Args:
        model: a `DiT`, or an `Engine` for ``dtype``.
        dtype: compute dtype of the model's branches.
        tick: called with x (B, C, S, S) once per model call.
        allow_mismatch: take a sampler and guidance that contradict the model's ``sampling``.

    Raises:
        SampleError: one of them contradicts it, or the scale is no number.
    """
    try:
        check_number("guidance.scale", guidance.scale)
    except ValueError as error:
        raise SampleError(str(error)) from error
    engine = model if isinstance(model, Engine) else Engine(model, dtype)
    if not allow_mismatch:
        check_fit(getattr(engine.model, "sampling", {}), sampler, guidance)
    noise = torch.stack([each.noise for each in starts]).to(device)
    labels = torch.tensor([each.label for each in starts], device=device)
    predict = with_guidance(engine, labels, guidance, sampler.times, tick)
    occurring = [each.label for each in starts] + [engine.y_embedder.num_classes] * (guidance.scale > 1)
    # around the whole loop: autocast caches its weight casts until it exits
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), autocast, engine.run(sampler.timesteps, occurring):
        return sampler(predict, noise, [each.generator for each in starts])


def check_fit(recorded: dict[str, Any], sampler: Sampler | FlowSampler, guidance: Guidance) -> None:
    """Reject a sampler made for another model than the one with this ``sampling``, and guidance on top of its own.

    Raises:
        SampleError: naming the field and both values.
    """
    for name, value in sampler.made_for.items():
        if recorded.get(name, value) != value:
            raise SampleError(
                f"the sampler's {name} must be the model's, {recorded[name]!r}, got {value!r}: see model.sampling, "
                "or pass allow_mismatch=True"
            )
    if guidance.scale > 1 and (learned := recorded.get("guidance", 1)) != 1:
        raise SampleError(
            f"guidance.scale must be 1 for a model trained to guide itself, by {learned:g}, got {guidance.scale:g}: "
            "or pass allow_mismatch=True"
        )
