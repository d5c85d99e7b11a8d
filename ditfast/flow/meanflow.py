"""MeanFlow: models of the average velocity over a stretch of time, which draw a sample in one step."""

import torch

from ditfast.diffusion.checks import floating, like
from ditfast.diffusion.losses import mean_flat
from ditfast.diffusion.noise import noise_like
from ditfast.flow import checks
from ditfast.flow.times import TimeSampling


class MeanFlow:
    """How a model of average velocities is trained, and sampled from.

    A model is any callable ``model(x, t, r=r, **model_kwargs)``, as a `DiT` with ``second_time=True``: of x at time t
    it predicts the average velocity on the way to time r, so that x + (r - t) * model(x, t, r=r) is x at time r. Time
    is SiT's, from 0, noise, to 1, data, and t <= r. (The paper counts from data to noise: see
    `adapters.paper_mean_flow`.) Labels are dropped by the caller: all calls of a step have to see the same ones.

    Args:
        time_sampling, time_mean, time_std: of both times, see `TimeSampling`; the later one is r.
        interval_ratio: how often r differs from t; else the model learns the velocity itself.
        adaptive_power, adaptive_eps: p and c in the weight 1 / (|error|^2 + c)^p of a sample's squared error.
        guidance: omega, the scale of the guidance that the model learns; 1 for none.
        guidance_mix: kappa, how much of the model's own guided velocity stands in for the data's.
        guidance_interval: guide only at these times t.
        target_apart: make the target in a call of its own that keeps nothing for backward, before the model is called
            for its output: one forward more, and about half the memory. For activation checkpointing, through which
            PyTorch takes no tangents.
        null_label: what ``y`` in model_kwargs is where there is no label; needed for guidance.

    Raises:
        ValueError: naming the argument.

    Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling", sections 4.1 to 4.3. The defaults
    are those of its code.
    """

    def __init__(
        self,
        *,
        time_sampling="logit-normal",
        time_mean=0.4,
        time_std=1.0,
        interval_ratio=0.25,
        adaptive_power=1.0,
        adaptive_eps=0.01,
        guidance=1.0,
        guidance_mix=0.0,
        guidance_interval=(0.0, 1.0),
        target_apart=False,
        null_label=None,
    ):
        self.times = TimeSampling(time_sampling, time_mean, time_std)
        checks.number("interval_ratio", interval_ratio, 0, 1)
        checks.number("adaptive_power", adaptive_power, 0, 10)
        checks.number("adaptive_eps", adaptive_eps, 1e-12)
        checks.number("guidance", guidance, 0)
        checks.number("guidance_mix", guidance_mix, 0, 0.999)
        low, high = guidance_interval
        checks.number("guidance_interval", low, 0, 1)
        checks.number("guidance_interval", high, low, 1)
        if (guidance != 1 or guidance_mix) and null_label is None:
            raise ValueError(f"null_label must be given for guidance={guidance:g}, got None")
        self.interval_ratio, self.power, self.eps = interval_ratio, adaptive_power, adaptive_eps
        self.guidance, self.mix, self.guided_times = guidance, guidance_mix, (low, high)
        self.null_label, self.target_apart = null_label, target_apart

    def draw_times(self, count: int, device, generator=None):
        """t and r, (B,) each, t <= r."""
        first, second = (self.times.draw(count, device, generator) for _ in range(2))
        t, r = torch.minimum(first, second), torch.maximum(first, second)
        apart = torch.rand(count, device=device, generator=generator) < self.interval_ratio
        return t, torch.where(apart, r, t)

    def training_losses(self, model, x1, model_kwargs=None, *, t=None, r=None, noise=None):
        """The loss of each sample, by one forward-mode derivative of the model.

        Args:
            x1: (B, C, …) data.
            model_kwargs: further arguments of the model, such as ``{"y": labels}``.
            t, r: (B,) times, t <= r; both drawn where t is None, and r = t where r is.
            noise: (B, C, …); drawn where None.

        Returns:
            A dict of ``loss`` (B,); ``pred`` (B, C, …), the model's output; ``mse`` (B,), the squared error without
            its weight, which makes the loss of every sample about 1 where adaptive_power is.

        Raises:
            TypeError, ValueError: an argument, or the model's output, has the wrong dtype, shape or values.

        Source: Geng et al. 2025, equations 6 to 11 and 22.
        """
        floating("x1", x1)
        noise = noise_like(x1) if noise is None else noise
        like("noise", noise, "x1", x1)
        if t is None and r is not None:
            raise ValueError("t must be given where r is, got None")
        if t is None:
            t, r = self.draw_times(len(x1), x1.device)
        r = t if r is None else r
        check_order(t, r, x1)
        kwargs = model_kwargs or {}
        at = _per_sample(t, x1)
        x = (at * x1 + (1 - at) * noise).to(x1.dtype)
        v = self._guided(model, x, t, x1 - noise, kwargs)

        def average_velocity(x, t):
            return checks.model_output(model(x, t, r=r, **kwargs), x)

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.target_apart):
            pred, change = torch.func.jvp(average_velocity, (x, t), (v.to(x.dtype), torch.ones_like(t)))
        pred = average_velocity(x, t) if self.target_apart else pred
        target = (v + _per_sample(r - t, x1) * change).detach()
        squares = (pred - target) ** 2
        total = squares.flatten(1).sum(1)  # (B,)
        weight = (total.detach() + self.eps) ** -self.power
        return {"loss": weight * total, "pred": pred, "mse": mean_flat(squares.detach())}

    @torch.no_grad()
    def _guided(self, model, x, t, v, kwargs):
        """The velocity that the target is made of: the data's, or guided. Source: equations 19 and 21."""
        if self.guidance == 1 and not self.mix:
            return v
        y, (low, high) = kwargs["y"], self.guided_times
        without = checks.model_output(model(x, t, r=t, **{**kwargs, "y": torch.full_like(y, self.null_label)}), x)
        guided = self.guidance * v + (1 - self.guidance - self.mix) * without
        if self.mix:
            guided = guided + self.mix * checks.model_output(model(x, t, r=t, **kwargs), x)
        applies = (t >= low) & (t <= high) & (y != self.null_label)
        return torch.where(_per_sample(applies, x), guided, v)

    @torch.no_grad()
    def sample(self, model, noise, y=None, steps=1):
        """Samples (B, C, …) from noise, in ``steps`` equal steps of one call each.

        Args:
            y: (B,) labels; None for a model without.

        Raises:
            TypeError, ValueError: noise, steps or an output of the model that do not fit.
        """
        floating("noise", noise)
        checks.whole("steps", steps, 1)
        x, kwargs = noise.to(torch.promote_types(noise.dtype, torch.float32)), {} if y is None else {"y": y}
        for step in range(steps):
            t, r = (torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device) for i in (step, step + 1))
            x = x + checks.model_output(model(x.to(noise.dtype), t, r=r, **kwargs), x) / steps
        return x.to(noise.dtype)


def check_order(t, r, x) -> None:
    """t and r are times (B,), and t is not after r."""
    checks.times("t", t, x)
    checks.times("r", r, x)
    if checks.is_readable(t) and (t > r).any():
        first = int((t > r).nonzero()[0])
        rule = "r must be at or after t, since time runs from 0, noise, to 1, data"
        raise ValueError(f"{rule}: got r={r[first]:g} for t={t[first]:g}")


def _per_sample(t, x):
    """(B,) as (B, 1, …)."""
    return t.view(-1, *[1] * (x.dim() - 1))
