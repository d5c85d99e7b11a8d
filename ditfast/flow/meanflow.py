"""MeanFlow: models of the average velocity over a time interval, which sample in one step."""

from collections.abc import Callable

import torch

from ditfast.diffusion.checks import floating, like
from ditfast.diffusion.losses import mean_flat
from ditfast.diffusion.noise import noise_like
from ditfast.flow import checks
from ditfast.flow.times import TimeDistribution, TimeSampling


class MeanFlow:
    """Training and sampling of a model of average velocities.

    A model is any callable ``model(x, t, r=r, **model_kwargs)``, such as a `DiT` with ``second_time=True``. From x at
    time t it predicts the average velocity until time r: x + (r - t) * model(x, t, r=r) is x at time r. As in SiT,
    time runs from 0, noise, to 1, data, and t <= r. (The paper's runs the other way: see `adapters.paper_mean_flow`.)
    The caller drops labels, since all model calls of a training step must see the same ones; the model itself must
    not, so keep a `DiT` in ``eval()`` mode, which changes nothing else.

    Args:
        time_sampling, time_mean, time_std: of both times, see `TimeSampling`; r is the later one.
        interval_ratio: probability that r differs from t; else the model learns the velocity itself.
        adaptive_power, adaptive_eps: p and c in the weight 1 / (|error|^2 + c)^p of a sample's squared error.
        guidance: omega, the guidance scale that the model learns; 1 for none.
        guidance_mix: kappa, the share of the model's own guided velocity that replaces the data's.
        guidance_interval: guide only at times t in this interval.
        target_apart: compute the target in a separate call without autograd, before the call for the output: one more
            forward, about half the memory. Needed for activation checkpointing, which does not support forward-mode
            AD.
        null_label: the value of ``y`` in model_kwargs for no label; needed for guidance.

    Raises:
        ValueError: naming the argument.

    Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling", sections 4.1 to 4.3. The defaults
    are those of its code.
    """

    def __init__(
        self,
        *,
        time_sampling: TimeDistribution = "logit-normal",
        time_mean: float = 0.4,
        time_std: float = 1.0,
        interval_ratio: float = 0.25,
        adaptive_power: float = 1.0,
        adaptive_eps: float = 0.01,
        guidance: float = 1.0,
        guidance_mix: float = 0.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        target_apart: bool = False,
        null_label: int | None = None,
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

    def draw_times(
        self, count: int, device: str | torch.device, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw t and r, (B,) each, t <= r."""
        first, second = (self.times.draw(count, device, generator) for _ in range(2))
        t, r = torch.minimum(first, second), torch.maximum(first, second)
        apart = torch.rand(count, device=device, generator=generator) < self.interval_ratio
        return t, torch.where(apart, r, t)

    def training_losses(
        self,
        model: Callable,
        x1: torch.Tensor,
        model_kwargs: dict | None = None,
        *,
        t: torch.Tensor | None = None,
        r: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The training loss of each sample, from one forward-mode derivative (JVP) of the model.

        Args:
            x1: (B, C, …) data.
            model_kwargs: further arguments of the model, such as ``{"y": labels}``.
            t, r: (B,) times, t <= r. If t is None, both are drawn; if only r is None, r = t.
            noise: (B, C, …); drawn if None.

        Returns:
            A dict of ``loss`` (B,); ``pred`` (B, C, …), the model's output; ``mse`` (B,), the squared error without
            the adaptive weight, which with adaptive_power=1 makes every sample's loss about 1.

        Raises:
            TypeError, ValueError: an argument, or the model's output, has the wrong dtype, shape or values.

        Source: Geng et al. 2025, equations 6 to 11 and 22.
        """
        floating("x1", x1)
        noise = noise_like(x1) if noise is None else noise
        like("noise", noise, "x1", x1)
        if t is None and r is not None:
            raise ValueError("t must be given if r is, got None")
        if t is None:
            t, r = self.draw_times(len(x1), x1.device)
        r = t if r is None else r
        check_order(t, r, x1)
        kwargs = model_kwargs or {}
        self._check_labels(model, kwargs)
        at = _per_sample(t, x1)
        x = (at * x1 + (1 - at) * noise).to(x1.dtype)
        v = self._guided(model, x, t, x1 - noise, kwargs)

        def average_velocity(x, t):
            return checks.model_output(model(x, t, r=r, **kwargs), x)

        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.target_apart):
            tangents = v.to(x.dtype), torch.ones_like(t)
            pred, change, *_ = torch.func.jvp(average_velocity, (x, t), tangents)
        pred = average_velocity(x, t) if self.target_apart else pred
        target = (v + _per_sample(r - t, x1) * change).detach()
        squares = (pred - target) ** 2
        total = squares.flatten(1).sum(1)  # (B,)
        weight = (total.detach() + self.eps) ** -self.power
        return {"loss": weight * total, "pred": pred, "mse": mean_flat(squares.detach())}

    def _check_labels(self, model, kwargs):
        if (self.guidance != 1 or self.mix) and "y" not in kwargs:
            raise ValueError(
                f"model_kwargs must have y, labels, for guidance={self.guidance:g}, got {sorted(kwargs)}"
            )
        embedder = getattr(getattr(model, "module", model), "y_embedder", None)  # of a DiT, also in DDP
        if getattr(embedder, "training", False) and getattr(embedder, "dropout_prob", 0) > 0:
            raise ValueError(
                "model must not drop labels, since each call would drop others: call model.eval(), which changes "
                "nothing else in a DiT, and drop them in y; "
                f"got dropout_prob={embedder.dropout_prob:g} in training mode"
            )

    @torch.no_grad()
    def _guided(self, model, x, t, v, kwargs):
        """The velocity in the target: the data's, or guided. Source: equations 19 and 21."""
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
    def sample(
        self, model: Callable, noise: torch.Tensor, y: torch.Tensor | None = None, steps: int = 1
    ) -> torch.Tensor:
        """Samples (B, C, …) from noise of that shape, in ``steps`` equal steps with one model call each.

        Args:
            y: (B,) labels; None for a model without labels.

        Raises:
            TypeError, ValueError: noise, steps or a model output that do not fit.
        """
        floating("noise", noise)
        checks.integer("steps", steps, 1)
        x, kwargs = noise.to(torch.promote_types(noise.dtype, torch.float32)), {} if y is None else {"y": y}
        for step in range(steps):
            t, r = (torch.full((len(x),), i / steps, dtype=x.dtype, device=x.device) for i in (step, step + 1))
            x = x + checks.model_output(model(x.to(noise.dtype), t, r=r, **kwargs), x) / steps
        return x.to(noise.dtype)


def check_order(t: torch.Tensor, r: torch.Tensor, x: torch.Tensor) -> None:
    """Check that t and r are times (B,) with t <= r."""
    checks.times("t", t, x)
    checks.times("r", r, x)
    if checks.is_readable(t) and (t > r).any():
        first = int((t > r).nonzero()[0])
        rule = "r must be at or after t, since time runs from 0, noise, to 1, data"
        raise ValueError(f"{rule}: got r={r[first]:g} for t={t[first]:g}")


def _per_sample(t, x):
    """(B,) as (B, 1, …)."""
    return t.view(-1, *[1] * (x.dim() - 1))
