"""Samplers for models of a flow or of its average velocity."""

from collections.abc import Callable

import torch

from ditfast.flow import MeanFlow, create_transport, ode, schedulers, sde
from ditfast.flow import Sampler as Solver
from ditfast.sampling import SampleError
from ditfast.suggest import did_you_mean

FIXED = {"euler": "euler", "heun": "heun2"}  # ditfast.flow's names
FLOW_SAMPLERS = (*FIXED, "ode", "sde", *schedulers.NAMES)
MEAN_SAMPLERS = ("one-step", "average")
ADAPTIVE = "ode"  # its steps depend on the whole batch


class FlowSampler:
    """A sampling loop with the interface of `ditfast.sampling.sampler.Sampler`.

    Args:
        name: one of `FLOW_SAMPLERS`; for a model of average velocities also one of `MEAN_SAMPLERS`.
        steps: number of steps; None for "ode", which takes as many as it needs.
        record: the model's ``sampling``.
        time_shift: above 1 puts more steps near noise, see `ditfast.flow.times.shift_times`.

    Attributes:
        timesteps: the timestep of each model call; [] if the solver decides.
        times: the same on the scale from 0, clean, to 1, noise.

    Raises:
        SampleError: a name or steps that do not fit the model, or a missing package.
    """

    def __init__(self, name: str, steps: int | None, record: dict, time_shift: float = 1.0):
        self.name, self.steps = name, steps
        known = (*MEAN_SAMPLERS, *FLOW_SAMPLERS) if record["objective"] == "meanflow" else FLOW_SAMPLERS
        if name not in known:
            hint = did_you_mean(name, known, cutoff=0.6)
            objective = record["objective"]
            raise SampleError(
                f"--sampler must be one of {', '.join(known)} for a {objective} model, got {name!r}{hint}"
            )
        if (steps is None) != (name == ADAPTIVE):
            raise SampleError(f"--steps is for all samplers but {ADAPTIVE}, got {steps} for --sampler {name}")
        if name == "one-step" and steps != 1:
            raise SampleError(f"--sampler one-step takes 1 step, got {steps}: use --sampler average for more")
        flow = {key: record[key] for key in ("path_type", "prediction") if key in record}
        try:
            self._solver = Solver(create_transport(**flow))
            self._run, self.timesteps = self._prepare(time_shift)
        except (ValueError, ImportError) as error:
            of = f"--sampler {name}" + ("" if steps is None else f" --steps {steps}")
            raise SampleError(f"{of}: {error}") from error
        self.times: _Watched | list[float] = _Watched() if name == ADAPTIVE else [1 - t for t in self.timesteps]

    def _prepare(self, time_shift):
        """The loop, a function of model, noise and generators, and the times of its model calls."""
        name, steps, solver = self.name, self.steps, self._solver
        if name in FIXED:
            points = solver.ode_times(steps + 1, time_shift=time_shift)
            options = {"num_steps": steps + 1, "time_shift": time_shift, "last_only": True}
            sample = solver.sample_ode(sampling_method=FIXED[name], **options)
            return lambda model, noise, _: sample(noise, model)[-1], ode.call_times(FIXED[name], points)
        if name == ADAPTIVE:
            sample = solver.sample_ode(last_only=True)
            return lambda model, noise, _: sample(noise, self.times.watch(model))[-1], []
        if name == "sde":
            form = {"sampling_method": "Euler", "diffusion_form": "sigma", "last_step": "Mean", "num_steps": steps}
            points = solver.sde_times(**form, last_step_size=1 / steps)
            options = {**form, "last_step_size": 1 / steps, "last_only": True}
            times = sde.call_times("Euler", "Mean", points)
            return lambda model, noise, own: solver.sample_sde(**options, generator=own)(noise, model)[-1], times
        if name in MEAN_SAMPLERS:
            times = [step / steps for step in range(steps)]
            return lambda model, noise, _: MeanFlow().sample(model, noise, steps=steps), times
        if solver.transport.path_type != "Linear" or solver.transport.prediction != "velocity":
            raise ValueError("diffusers' flow schedulers need a model of velocities on the Linear path")
        scheduler = schedulers.make_scheduler(name, time_shift)

        def run(model, noise, _):
            return schedulers.sample_with_scheduler(model, scheduler, noise.shape, steps, noise)

        return run, schedulers.set_steps(scheduler, steps)

    def __call__(
        self, model: Callable[..., torch.Tensor], noise: torch.Tensor, generators: list[torch.Generator]
    ) -> torch.Tensor:
        """Samples (B, C, S, S) from noise of that shape, with one generator per sample for the steps."""
        return self._run(model, noise, generators)


class _Watched:
    """The times of an adaptive solver's model calls, each read from the call itself."""

    def __iter__(self):
        return self

    def __next__(self):
        return self._time

    def __len__(self):
        return 0

    def watch(self, model):
        def watched(x, t):
            self._time = 1 - float(t[0])
            return model(x, t)

        return watched
