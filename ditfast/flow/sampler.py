"""Samples from a model of a flow, by its ODE or an SDE of the same marginals; and likelihoods."""

import math
from collections import deque

import torch

from ditfast.diffusion.checks import floating
from ditfast.diffusion.noise import noise_like
from ditfast.flow import checks, ode, paths, sde
from ditfast.flow.times import shift_times
from ditfast.flow.transport import Transport

SINGULAR_EPS = 1e-3  # how far an SDE stays from a time at which its drift is infinite, where no sample_eps says


class Sampler:
    """Samplers of models that were trained with ``transport``, with SiT's names and semantics.

    Each method returns a function ``fn(init, model, **model_kwargs)`` of noise (B, C, …), or what it says.
    """

    def __init__(self, transport: Transport):
        self.transport = transport

    def sample_ode(
        self,
        *,
        sampling_method="dopri5",
        num_steps=50,
        atol=1e-6,
        rtol=1e-3,
        reverse=False,
        time_shift=1.0,
        last_only=False,
    ):
        """The probability flow: a function that returns all of its points, (num_steps, B, C, …), samples last.

        Args:
            sampling_method: "euler" or "heun2" in num_steps - 1 steps, or one of torchdiffeq's, see `ode.METHODS`.
            num_steps: points in time. An adaptive method takes steps of its own between them.
            atol, rtol: tolerances of an adaptive method.
            reverse: from data to noise.
            time_shift: more steps near noise, see `shift_times`.
            last_only: return the last point alone, as (1, B, C, …).

        Raises:
            ValueError: naming the argument.
            ImportError: torchdiffeq is needed and missing.
        """
        ode.check_method(sampling_method)
        _check_tolerances(atol, rtol)
        times = self.ode_times(num_steps, reverse, time_shift)

        @torch.no_grad()
        def sample(init, model, **model_kwargs):
            x = _start(init)
            velocity = self._velocity(model, init.dtype, model_kwargs)
            if sampling_method in ode.OWN:
                points = torch.stack(_kept(ode.steps(sampling_method, velocity, x, times), last_only))
            elif last_only:
                points = ode.solve(sampling_method, velocity, x, [times[0], times[-1]], atol, rtol)[-1:]
            else:
                points = ode.solve(sampling_method, velocity, x, times, atol, rtol)
            return points.to(init.dtype)

        return sample

    def ode_times(self, num_steps: int, reverse=False, time_shift=1.0) -> list[float]:
        """The points in time of `sample_ode`."""
        checks.whole("num_steps", num_steps, 2)
        checks.number("time_shift", time_shift, 1e-3, 1e3)
        low, high = self.transport.interval(self.transport.sample_eps)
        even = torch.linspace(0, 1, num_steps, dtype=torch.float64, device="cpu")
        times = (low + (high - low) * shift_times(even, time_shift)).tolist()
        return times[::-1] if reverse else times

    def sample_sde(
        self,
        *,
        sampling_method="Euler",
        diffusion_form="SBDM",
        diffusion_norm=1.0,
        last_step="Mean",
        last_step_size=0.04,
        num_steps=250,
        generator=None,
        last_only=False,
    ):
        """An SDE: a function that returns a list of x after each of num_steps steps, samples last.

        Args:
            sampling_method: "Euler" or "Heun".
            diffusion_form, diffusion_norm: of the diffusion w, see `paths.DIFFUSION_FORMS`.
            last_step: without noise: "Mean", along the drift; "Euler", along the velocity; "Tweedie", the expected
                data; None for none.
            last_step_size: its length in time; the steps before end there.
            num_steps: all of them, the last one too.
            generator: of the noise; one, or one for each sample.
            last_only: return the last x alone, in a list.

        Raises:
            ValueError: naming the argument.
        """
        times = self.sde_times(sampling_method, diffusion_form, last_step, last_step_size, num_steps)
        checks.number("diffusion_norm", diffusion_norm, 0)
        size = times[-1], last_step_size

        @torch.no_grad()
        def sample(init, model, **model_kwargs):
            x, call = _start(init), self._call(model, init.dtype, model_kwargs)
            drift = sde.Drift(self.transport, diffusion_form, diffusion_norm, call)
            points = _kept(sde.steps(sampling_method, drift, x, times, generator), last_only)
            last = sde.last_step(last_step, drift, points[-1], *size)
            return [each.to(init.dtype) for each in ([last] if last_only else [*points, last])]

        return sample

    def sde_times(self, sampling_method, diffusion_form, last_step, last_step_size, num_steps) -> list[float]:
        """The points in time of `sample_sde`, up to the last step."""
        checks.choice("sampling_method", sampling_method, sde.METHODS)
        checks.choice("diffusion_form", diffusion_form, paths.DIFFUSION_FORMS)
        checks.choice("last_step", last_step, sde.LAST_STEPS)
        checks.whole("num_steps", num_steps, 3)
        low, high = self.transport.interval(self.transport.sample_eps)
        if diffusion_form == "SBDM" and self.transport.path_type != "VP":
            low = low or SINGULAR_EPS  # there w is infinite at noise
        if last_step is not None:
            checks.number("last_step_size", last_step_size, 1e-6, 0.999 - low)
            high = 1 - last_step_size
        elif sampling_method == "Heun":
            high = min(high, 1 - SINGULAR_EPS)  # the score at the end is asked for, and infinite at data
        return torch.linspace(low, high, num_steps, dtype=torch.float64, device="cpu").tolist()

    def sample_ode_likelihood(self, *, sampling_method="dopri5", num_steps=50, atol=1e-6, rtol=1e-3, generator=None):
        """A function of data (B, C, …) that returns its log likelihood (B,), in nats, and its noise (B, C, …).

        The divergence is estimated with one random sign for each number, the same at all times.

        Args:
            generator: of the signs; others: see `sample_ode`.

        Source: Grathwohl et al. 2019, "FFJORD", section 3.1; Hutchinson 1990.
        """
        ode.check_method(sampling_method, own=())
        _check_tolerances(atol, rtol)
        times = self.ode_times(num_steps, reverse=True)

        def likelihood(x, model, **model_kwargs):
            start = _start(x)
            signs = _random_signs(start, generator)
            velocity = self._velocity(model, x.dtype, model_kwargs)

            def change(t, state):
                with torch.enable_grad():
                    at = state[0].detach().requires_grad_()
                    v = velocity(t, at)
                    (pulled,) = torch.autograd.grad(v, at, signs)
                return v.detach(), (pulled * signs).flatten(1).sum(1)

            with torch.no_grad():
                state = start, start.new_zeros(len(x))
                points, gained = ode.solve(sampling_method, change, state, times, atol, rtol)
            return _normal_log_density(points[-1]) + gained[-1], points[-1].to(x.dtype)

        return likelihood

    def _call(self, model, dtype, model_kwargs):
        """The model's checked output as a function of a time, a number or (), and of x."""

        def call(t, x):
            given = x.to(dtype)
            if isinstance(t, torch.Tensor):
                times = t.to(x.dtype).expand(len(x))
            else:
                times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)  # filled on the device: no copy
            return checks.model_output(model(given, times, **model_kwargs), given)

        return call

    def _velocity(self, model, dtype, model_kwargs):
        call = self._call(model, dtype, model_kwargs)

        def velocity(t, x):
            output = call(t, x)
            if self.transport.prediction == "velocity":
                return output
            times = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(len(x))
            return self.transport.velocity(self.transport.point(times, x), x, output)

        return velocity


def _start(init):
    """Where a solver starts, in float32 or better."""
    floating("init", init)
    return init.to(torch.promote_types(init.dtype, torch.float32))


def _kept(points, last_only):
    """The points, or the last of them alone, as a list."""
    return list(deque(points, maxlen=1 if last_only else None))


def _check_tolerances(atol, rtol):
    checks.number("atol", atol, 0)
    checks.number("rtol", rtol, 0)


def _random_signs(x, generator):
    """1 or -1 for each number, from the one place where noise is drawn."""
    return torch.where(noise_like(x, generator) < 0, -1.0, 1.0).to(x.dtype)


def _normal_log_density(x):
    """Of the standard normal, for each sample: (B,)."""
    return -0.5 * (x.flatten(1) ** 2).sum(1) - 0.5 * x[0].numel() * math.log(2 * math.pi)
