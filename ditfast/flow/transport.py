"""A flow from noise to data: how a model of it is trained, and what its output says."""

import torch

from ditfast.diffusion.checks import floating, like
from ditfast.diffusion.losses import mean_flat
from ditfast.diffusion.noise import noise_like
from ditfast.flow import checks, paths
from ditfast.flow.times import TimeSampling

PREDICTIONS = ("velocity", "noise", "score")
LOSS_WEIGHTS = (None, "velocity", "likelihood")


def create_transport(
    path_type="Linear",
    prediction="velocity",
    loss_weight=None,
    train_eps=None,
    sample_eps=None,
    *,
    time_sampling="uniform",
    time_mean=0.0,
    time_std=1.0,
    time_shift=1.0,
):
    """The flow of a SiT.

    Args:
        path_type: "Linear", "GVP" or "VP", see `paths`.
        prediction: what the model's output is: "velocity", "noise" or "score".
        loss_weight: of the squared error of noise or score: "velocity" or "likelihood", which weight it as the error
            of the velocity, and as a bound of the likelihood; None for none. The error of a velocity has no weight.
        train_eps, sample_eps: how far from times at which something is infinite training and sampling stay. By
            default 0 where nothing is, else 1e-3, and 1e-5 for training on VP.
        time_sampling, time_mean, time_std, time_shift: the times to train on, see `TimeSampling`.

    Raises:
        ValueError: an unknown name, or a number out of range.
    """
    times = TimeSampling(time_sampling, time_mean, time_std, time_shift)
    return Transport(path_type, prediction, loss_weight, train_eps, sample_eps, times)


class Transport:
    """See `create_transport`.

    Time is SiT's: t in [0, 1], 0 noise, 1 data, given to the model as it is. A model is any callable
    ``model(x, t, **model_kwargs)`` that returns (B, C, …), or (B, 2C, …), whose second half is dropped.

    Source: Ma et al. 2024, "SiT"; Lipman et al. 2023, "Flow Matching for Generative Modeling".
    """

    def __init__(self, path_type, prediction, loss_weight, train_eps, sample_eps, times: TimeSampling):
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
        """The times that are at least ``eps`` from one at which something is infinite; VP starts at noise itself."""
        return 0.0 if self.path_type == "VP" else eps, 1 - eps

    def point(self, t, x) -> paths.Point:
        """The path at the times t (B,) in float32 or better, for x (B, …)."""
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        return paths.PATHS[self.path_type](t.view(-1, *[1] * (x.dim() - 1)))

    def draw_times(self, count: int, device, generator=None):
        """Times to train on: (B,) float32."""
        return self.times.draw(count, device, generator, *self.interval(self.train_eps))

    def training_losses(self, model, x1, model_kwargs=None, *, t=None, noise=None):
        """The loss of each sample.

        Args:
            x1: (B, C, …) data.
            model_kwargs: further arguments of the model, such as ``{"y": labels}``.
            t: (B,) times; drawn where None.
            noise: (B, C, …); drawn, before t as in SiT, where None.

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

    def velocity(self, p, x, output):
        """The velocity that a model's output at x means."""
        if self.prediction == "velocity":
            return output
        score = output if self.prediction == "score" else -output / p.sigma
        return paths.velocity_from_score(p, x, score)

    def score(self, p, x, output):
        """The score, the gradient of the log density, that a model's output at x means."""
        if self.prediction == "score":
            return output
        noise = output if self.prediction == "noise" else paths.noise_from_velocity(p, x, output)
        return -noise / p.sigma
