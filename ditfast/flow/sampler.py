"""Sample from a model of a flow, by its ODE or an SDE with the same marginals, and compute likelihoods."""

import math
from collections import deque
from collections.abc import Callable

import torch

from ditfast.diffusion.checks import floating
from ditfast.diffusion.noise import Generators, noise_like
from ditfast.flow import checks, ode, paths, sde
from ditfast.flow.times import shift_times
from ditfast.flow.transport import Transport

SINGULAR_EPS = 1e-3  # distance of an SDE from times at which its drift is infinite, if sample_eps is 0


class Sampler:
    """Samplers for models trained with ``transport``, with SiT's API and semantics.

    The ``sample_*`` methods return a function ``fn(init, model, **model_kwargs)``; init (B, C, …) is noise, or data
    where noted.
    """

    def __init__(self, transport: Transport):
        self.transport = transport

    def sample_ode(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        reverse: bool = False,
        time_shift: float = 1.0,
        last_only: bool = False,
    ) -> Callable[..., torch.Tensor]:
        """Sample by the probability flow ODE. The function returns all points, (num_steps, B, C, …), samples last.

        Args:
            sampling_method: "euler" or "heun2" with num_steps - 1 steps, or a torchdiffeq method, see `ode.METHODS`.
            num_steps: number of points in time. An adaptive method chooses its own steps between them.
            atol, rtol: tolerances of an adaptive method.
            reverse: go from data to noise.
            time_shift: above 1 puts more steps near noise, see `shift_times`.
            last_only: only return the last point, as (1, B, C, …).

        Raises:
            ValueError: naming the argument.
            ImportError: torchdiffeq is needed but missing.
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
            elif last_only and sampling_method in ode.ADAPTIVE:
                points = ode.solve(sampling_method, velocity, x, [times[0], times[-1]], atol, rtol)[-1:]
            else:
                points = ode.solve(sampling_method, velocity, x, times, atol, rtol)[-1 if last_only else 0 :]
            return points.to(init.dtype)

        return sample

    def ode_times(self, num_steps: int, reverse: bool = False, time_shift: float = 1.0) -> list[float]:
        """The points in time of `sample_ode`."""
        checks.integer("num_steps", num_steps, 2)
        checks.number("time_shift", time_shift, 1e-3, 1e3)
        low, high = self.transport.interval(self.transport.sample_eps)
        even = torch.linspace(0, 1, num_steps, dtype=torch.float64, device="cpu")
        times = (low + (high - low) * shift_times(even, time_shift)).tolist()
        return times[::-1] if reverse else times

    def sample_sde(
        self,
        *,
        sampling_method: str = "Euler",
        diffusion_form: str = "SBDM",
        diffusion_norm: float = 1.0,
        last_step: str | None = "Mean",
        last_step_size: float = 0.04,
        num_steps: int = 250,
        generator: Generators = None,
        last_only: bool = False,
    ) -> Callable[..., list[torch.Tensor]]:
        """Sample by an SDE. The function returns a list of x after each of num_steps steps, samples last.

        Args:
            sampling_method: "Euler" or "Heun".
            diffusion_form, diffusion_norm: of the diffusion w, see `paths.DIFFUSION_FORMS`.
            last_step: the final step, without noise: "Mean", along the drift; "Euler", along the velocity; "Tweedie",
                the expected data; None to omit it.
            last_step_size: the time interval of the last step.
            num_steps: number of steps, including the last one.
            generator: of the noise, see `noise_like`.
            last_only: only return the last x, as a list of one.

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

    def sde_times(
        self,
        sampling_method: str,
        diffusion_form: str,
        last_step: str | None,
        last_step_size: float,
        num_steps: int,
    ) -> list[float]:
        """The points in time of `sample_sde`, until the last step."""
        checks.choice("sampling_method", sampling_method, sde.METHODS)
        checks.choice("diffusion_form", diffusion_form, paths.DIFFUSION_FORMS)
        checks.choice("last_step", last_step, sde.LAST_STEPS)
        checks.integer("num_steps", num_steps, 3)
        low, high = self.transport.interval(self.transport.sample_eps)
        if diffusion_form == "SBDM" and self.transport.path_type != "VP":
            low = low or SINGULAR_EPS  # w is infinite at noise
        if last_step is not None:
            checks.number("last_step_size", last_step_size, 1e-6, 0.999 - low)
            high = 1 - last_step_size
        elif sampling_method == "Heun":
            high = min(high, 1 - SINGULAR_EPS)  # needs the score at the end, which is infinite at data
        return torch.linspace(low, high, num_steps, dtype=torch.float64, device="cpu").tolist()

    def sample_ode_likelihood(
        self,
        *,
        sampling_method: str = "dopri5",
        num_steps: int = 50,
        atol: float = 1e-6,
        rtol: float = 1e-3,
        generator: Generators = None,
    ) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """The likelihood. The function maps data (B, C, …) to the log likelihood (B,), in nats, and noise (B, C, …).

        The divergence is estimated with one random sign per element, the same at all times.

        Args:
            generator: of the signs.
            others: see `sample_ode`.

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
        """The model's checked output as a function of a time, a number or a tensor (), and x."""

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
    """The start of a solver, in float32 or better."""
    floating("init", init)
    return init.to(torch.promote_types(init.dtype, torch.float32))


def _kept(points, last_only):
    """The points, or only the last, as a list."""
    return list(deque(points, maxlen=1 if last_only else None))


def _check_tolerances(atol, rtol):
    checks.number("atol", atol, 0)
    checks.number("rtol", rtol, 0)


def _random_signs(x, generator):
    """1 or -1 per element, from the only function that draws noise."""
    return torch.where(noise_like(x, generator) < 0, -1.0, 1.0).to(x.dtype)


def _normal_log_density(x):
    """Of the standard normal, per sample: (B,)."""
    return -0.5 * (x.flatten(1) ** 2).sum(1) - 0.5 * x[0].numel() * math.log(2 * math.pi)
