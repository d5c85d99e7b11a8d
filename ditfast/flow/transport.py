"""A flow from noise to data: the training loss, and conversions of the model's output."""

from collections.abc import Callable
from typing import Literal

import torch

from ditfast.diffusion.checks import floating, like
from ditfast.diffusion.losses import mean_flat
from ditfast.diffusion.noise import noise_like
from ditfast.flow import checks, paths
from ditfast.flow.times import TimeDistribution, TimeSampling

PREDICTIONS = ("velocity", "noise", "score")
LOSS_WEIGHTS = (None, "velocity", "likelihood")
PathType = Literal["Linear", "GVP", "VP"]
Prediction = Literal["velocity", "noise", "score"]
LossWeight = Literal["velocity", "likelihood"] | None


def create_transport(
    path_type: PathType = "Linear",
    prediction: Prediction = "velocity",
    loss_weight: LossWeight = None,
    train_eps: float | None = None,
    sample_eps: float | None = None,
    *,
    time_sampling: TimeDistribution = "uniform",
    time_mean: float = 0.0,
    time_std: float = 1.0,
    time_shift: float = 1.0,
) -> "Transport":
    """Create the flow of a SiT.

    Args:
        path_type: "Linear", "GVP" or "VP", see `paths`.
        prediction: the model's output: "velocity", "noise" or "score".
        loss_weight: weight of the squared error of noise or score: "velocity", as in the error of the velocity;
            "likelihood", as in a bound on the likelihood; None for none. Ignored for prediction="velocity".
        train_eps, sample_eps: distance that training and sampling keep from singular times. By default 0 if there are
            none, else 1e-3, and 1e-5 for training on VP.
        time_sampling, time_mean, time_std, time_shift: the training times, see `TimeSampling`.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """
    times = TimeSampling(time_sampling, time_mean, time_std, time_shift)
    return Transport(path_type, prediction, loss_weight, train_eps, sample_eps, times)


class Transport:
    """A flow; see `create_transport` for the arguments.

    Time is SiT's, t in [0, 1] from noise to data, and passed to the model unscaled. A model is any callable
    ``model(x, t, **model_kwargs)`` that returns (B, C, …), or (B, 2C, …), whose second half is dropped.

    Source: Ma et al. 2024, "SiT"; Lipman et al. 2023, "Flow Matching for Generative Modeling".
    """

    train_eps: float
    sample_eps: float

    def __init__(
        self,
        path_type: PathType,
        prediction: Prediction,
        loss_weight: LossWeight,
        train_eps: float | None,
        sample_eps: float | None,
        times: TimeSampling,
    ):
        checks.choice("path_type", path_type, paths.PATHS)
        checks.choice("prediction", prediction, PREDICTIONS)
        checks.choice("loss_weight", loss_weight, LOSS_WEIGHTS)
        self.path_type, self.prediction, self.loss_weight, self.times = path_type, prediction, loss_weight, times
        bounded = prediction == "velocity" and path_type != "VP"
        defaults = {"train_eps": 0 if bounded else 1e-5 if path_type == "VP" else 1e-3}
        defaults["sample_eps"] = 0 if bounded else 1e-3
        for name, given in (("train_eps", train_eps), ("sample_eps", sample_eps)):
            value = defaults[name] if given is None else given
            checks.number(name, value, 0 if bounded else 1e-9, 0.499)
            setattr(self, name, value)

    def interval(self, eps: float) -> tuple[float, float]:
        """The times at least ``eps`` from the singular ones; VP has no singularity at noise."""
        return 0.0 if self.path_type == "VP" else eps, 1 - eps

    def point(self, t: torch.Tensor, x: torch.Tensor) -> paths.Point:
        """The path at times t (B,), in float32 or better, which broadcasts with x (B, …)."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        return paths.PATHS[self.path_type](t.view(-1, *[1] * (x.dim() - 1)))

    def draw_times(
        self, count: int, device: str | torch.device, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Draw training times (B,), float32."""
        return self.times.draw(count, device, generator, *self.interval(self.train_eps))

    def training_losses(
        self,
        model: Callable,
        x1: torch.Tensor,
        model_kwargs: dict | None = None,
        *,
        t: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The training loss of each sample.

        Args:
            x1: (B, C, …) data.
            model_kwargs: further arguments of the model, such as ``{"y": labels}``.
            t: (B,) times; drawn if None.
            noise: (B, C, …); drawn if None, before t, as in SiT.

        Returns:
            A dict of ``loss`` (B,) and ``pred`` (B, C, …), the model's output.

        Raises:
            TypeError, ValueError: an argument, or the model's output, has the wrong dtype, shape or values.

        Source: Ma et al. 2024, section 2.2.
        """
        floating("x1", x1)
        noise = noise_like(x1) if noise is None else noise
        like("noise", noise, "x1", x1)
        t = self.draw_times(len(x1), x1.device) if t is None else t
        checks.times("t", t, x1)
        p = self.point(t, x1)
        output = checks.model_output(model(paths.x_t(p, x1, noise).to(x1.dtype), t, **(model_kwargs or {})), x1)
        return {"loss": mean_flat(self._weighted_square(p, output, x1, noise)), "pred": output}

    def _weighted_square(self, p, output, x1, noise):
        if self.prediction == "velocity":
            return (output - paths.velocity(p, x1, noise)) ** 2
        error = output - noise if self.prediction == "noise" else p.sigma * output + noise
        if self.loss_weight is None:
            return error**2
        w = paths.diffusivity(p)
        return (w / p.sigma**2 if self.loss_weight == "likelihood" else (w / p.sigma) ** 2) * error**2

    def velocity(self, p: paths.Point, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Convert a model's output at x to a velocity."""
        if self.prediction == "velocity":
            return output
        score = output if self.prediction == "score" else -output / p.sigma
        return paths.velocity_from_score(p, x, score)

    def score(self, p: paths.Point, x: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Convert a model's output at x to a score, the gradient of the log density."""
        if self.prediction == "score":
            return output
        noise = output if self.prediction == "noise" else paths.noise_from_velocity(p, x, output)
        return -noise / p.sigma
