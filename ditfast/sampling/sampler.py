"""From noise to samples: the steps, the guidance, the precision."""

from typing import NamedTuple

import torch

from ditfast.diffusion import create_diffusion
from ditfast.diffusion.schedule import noisiest_step
from ditfast.diffusion.schedulers import NAMES, make_scheduler, sample_with_scheduler, set_steps
from ditfast.sampling import SampleError
from ditfast.sampling.engine import Engine

OWN = {"ddpm": "{}", "ddim": "ddim{}"}  # this package's samplers, with the steps that each keeps
SAMPLERS = (*OWN, *(name for name in NAMES if name not in OWN))


class Sampler:
    """A loop of a given number of steps.

    Args:
        name: one of `SAMPLERS`, or a scheduler class of diffusers.
        steps: how many.
        learn_sigma: the model predicts a variance too.
        clip: clamp predictions of the clean sample to [-1, 1]; without, start where they can be told from noise.
        noise_schedule: that the model was trained with, see `create_diffusion`.

    Attributes:
        timesteps: what the model is called with, call by call.
        times: the same as a fraction of the whole process: 0 clean, towards 1 noise.

    Raises:
        SampleError: an unknown name, steps that do not fit it, or diffusers is needed and missing.
    """

    def __init__(self, name: str, steps: int, learn_sigma: bool, clip: bool, noise_schedule: str = "linear"):
        self.name, self.steps, self.learn_sigma, self.clip = name, steps, learn_sigma, clip
        try:
            process = {"noise_schedule": noise_schedule, "learn_sigma": learn_sigma}
            self.diffusion = create_diffusion("", **process)
            if name in OWN:
                last = None if clip else noisiest_step(self.diffusion.original_betas)
                self.diffusion = create_diffusion(OWN[name].format(steps), last_step=last, **process)
            self.scheduler = None if name in OWN else make_scheduler(name, self.diffusion)
            timesteps = self._timesteps()
        except (ValueError, ImportError) as error:
            raise SampleError(f"--sampler {name} --steps {steps}: {error}") from error
        self.timesteps = [float(t) for t in timesteps]
        self.times = [t / self.diffusion.original_num_steps for t in self.timesteps]

    def _timesteps(self):
        if self.scheduler is None:
            return self.diffusion.timestep_map[::-1]
        set_steps(self.scheduler, self.steps)
        return self.scheduler.timesteps.tolist()

    def __call__(self, model, noise, generators):
        """Samples (B, C, S, S) from noise, each with a generator of its own for its steps."""
        shape, shared = noise.shape, {"noise": noise, "generator": generators}
        if self.scheduler is not None:
            shared |= {"learn_sigma": self.learn_sigma, "clip_denoised": self.clip}
            return sample_with_scheduler(model, self.scheduler, shape, self.steps, **shared)
        loop = {"ddpm": self.diffusion.p_sample_loop, "ddim": self.diffusion.ddim_sample_loop}[self.name]
        return loop(model, shape, clip_denoised=self.clip, **shared)


class Guidance(NamedTuple):
    """Classifier-free guidance of the first ``channels`` by ``scale``, at times from ``low`` to ``high``."""

    scale: float
    low: float
    high: float
    channels: int

    def applies_at(self, time: float) -> bool:
        return self.scale > 1 and self.low <= time <= self.high


def with_guidance(model, labels, guidance: Guidance, times, tick=lambda: None):
    """The model as samplers call it, ``predict(x, t)``, once for each of ``times``; ``tick`` hears of every call.

    Those of average velocities name r too, the other end of a stretch of time.

    Only a call that is guided has twice the batch. Both halves are given the same x, so that samplers see, and draw
    noise for, one half. The time comes from the host: reading t would make each step wait for the device.
    """
    upcoming = iter(times)
    nulls = torch.full_like(labels, model.y_embedder.num_classes)
    both = torch.cat([labels, nulls])

    def predict(x, t, **stretch):
        tick()
        if not guidance.applies_at(next(upcoming)):
            return model(x, t, labels, **stretch).float()
        twice, stretch = (x.repeat(2, 1, 1, 1), t.repeat(2)), {name: r.repeat(2) for name, r in stretch.items()}
        return model.forward_with_cfg(*twice, both, guidance.scale, guidance.channels, **stretch)[: len(x)].float()

    return predict


def sample(model, sampler: Sampler, guidance: Guidance, starts, device, dtype=torch.float32, tick=lambda: None):
    """Samples (B, C, S, S) in float32, one for each `Start`.

    Args:
        model: a model, whose branches compute in ``dtype``, or an `Engine` for that dtype.
    """
    engine = model if isinstance(model, Engine) else Engine(model, dtype)
    noise = torch.stack([each.noise for each in starts]).to(device)
    labels = torch.tensor([each.label for each in starts], device=device)
    predict = with_guidance(engine, labels, guidance, sampler.times, tick)
    occurring = [each.label for each in starts] + [engine.y_embedder.num_classes] * (guidance.scale > 1)
    # around the whole loop: autocast keeps its copies of the weights until it ends
    autocast = torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)
    with torch.no_grad(), autocast, engine.run(sampler.timesteps, occurring):
        return sampler(predict, noise, [each.generator for each in starts])
