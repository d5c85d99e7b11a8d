"""Samplers for models of a flow or of its average velocity."""

from collections.abc import Callable
from typing import Any

import torch

from ditfast.flow import MeanFlow, create_transport, ode, schedulers, sde
from ditfast.flow import Sampler as Solver
from ditfast.flow.checks import MOST
from ditfast.sampling import SampleError, solvers
from ditfast.sampling.solvers import FIXED, FLOW_SAMPLERS, MEAN_SAMPLERS, ODE, SDE
from ditfast.suggest import did_you_mean


class FlowSampler:
    """A sampling loop with the interface of `ditfast.sampling.sampler.Sampler`.

    Args:
        name: one of `FLOW_SAMPLERS`; for a model of average velocities also one of `MEAN_SAMPLERS`.
        steps: number of steps; None for "ode" with an adaptive method, which takes as many as it needs.
        record: the model's ``sampling``.
        options: arguments of `ditfast.flow.Sampler` that fit the sampler, such as ``time_shift=3``,
            ``sampling_method="rk4"`` or ``diffusion_form="SBDM"``; see `solvers.OPTIONS`. last_step may be "none".

    Attributes:
        timesteps: the timestep of each model call; [] if the solver decides.
        times: the same on the scale from 0, clean, to 1, noise.
        made_for: the fields of ``record`` that determine the samples.

    Raises:
        SampleError: a name, steps or options that do not fit the model or each other, or a missing package.
    """

    def __init__(self, name: str, steps: int | None, record: dict, **options: Any):
        self.name, self.steps = name, steps
        objective = record["objective"]
        known = (*MEAN_SAMPLERS, *FLOW_SAMPLERS) if objective == "meanflow" else FLOW_SAMPLERS
        if name not in known:
            hint = did_you_mean(name, known, cutoff=0.6)
            raise SampleError(f"name must be one of {', '.join(known)} for a {objective} model, got {name!r}{hint}")
        if (why := solvers.why_not_taken(name, options)) is not None:
            raise SampleError(why)
        self._check_steps(solvers.is_adaptive(name, options))
        self.made_for = {key: record[key] for key in ("objective", "path_type", "prediction") if key in record}
        try:
            self._solver = Solver(create_transport(**{k: v for k, v in self.made_for.items() if k != "objective"}))
            self.times: _Watched | list[float] = _Watched()
            self._run, timesteps = self._prepare(options)
        except (ValueError, ImportError) as error:
            raise SampleError(str(error)) from error
        self.timesteps = [] if timesteps is None else timesteps
        if timesteps is not None:
            self.times = [1 - t for t in timesteps]

    def _check_steps(self, adaptive):
        name, steps = self.name, self.steps
        if (steps is None) != adaptive:
            rule = f"are for all samplers but {ODE} with an adaptive method"
            raise SampleError(f"steps {rule}, got {steps} for {name}")
        if name == "one-step" and steps != 1:
            raise SampleError(f"steps must be 1 for one-step, got {steps}: the sampler average takes more")
        least = 3 if name == SDE else 1
        if steps is not None and not least <= steps < MOST:
            raise SampleError(f"steps must be in [{least}, {MOST - 1}] for {name}, got {steps}")

    def _prepare(self, options):
        """The loop, a function of model, noise and generators, and the times of its model calls, None if unknown."""
        name, steps, solver = self.name, self.steps, self._solver
        if name in FIXED or name == ODE:
            return self._prepare_ode({"sampling_method": FIXED.get(name, "dopri5"), **options})
        if name == SDE:
            return self._prepare_sde(options)
        if name in MEAN_SAMPLERS:
            times = [step / steps for step in range(steps)]
            return lambda model, noise, _: MeanFlow().sample(model, noise, steps=steps), times
        if solver.transport.path_type != "Linear" or solver.transport.prediction != "velocity":
            raise ValueError(f"name {name} is for models of velocities on the Linear path")
        scheduler = schedulers.make_scheduler(name, **options)

        def run(model, noise, _):
            return schedulers.sample_with_scheduler(model, scheduler, noise.shape, steps, noise)

        return run, schedulers.set_steps(scheduler, steps)

    def _prepare_ode(self, options):
        method, points = options["sampling_method"], {} if self.steps is None else {"num_steps": self.steps + 1}
        sample = self._solver.sample_ode(**points, **options, last_only=True)
        if method not in ode.OWN:
            return lambda model, noise, _: sample(noise, self.times.watch(model))[-1], None
        times = self._solver.ode_times(**points, time_shift=options.get("time_shift", 1.0))
        return lambda model, noise, _: sample(noise, model)[-1], ode.call_times(method, times)

    def _prepare_sde(self, options):
        form = {"sampling_method": "Euler", "diffusion_form": "sigma", "last_step": "Mean", "num_steps": self.steps}
        form |= {"last_step_size": 1 / self.steps, **options}
        form["last_step"] = None if form["last_step"] == solvers.NONE else form["last_step"]
        points = self._solver.sde_times(**{key: value for key, value in form.items() if key != "diffusion_norm"})
        times = sde.call_times(form["sampling_method"], form["last_step"], points)

        def run(model, noise, own):
            return self._solver.sample_sde(**form, last_only=True, generator=own)(noise, model)[-1]

        self._solver.sample_sde(**form)  # checks the values
        return run, times

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
