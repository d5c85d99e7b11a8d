from types import SimpleNamespace

import pytest
import torch

from ditfast.flow import create_transport

MEAN, STD = 0.3, 0.5  # of the data


class Gaussian:
    """The exact model of a flow to normal data, with a mean and a standard deviation per element."""

    def __init__(self, path_type="Linear", prediction="velocity"):
        self.transport, self.prediction = create_transport(path_type, prediction), prediction

    def moments(self, t, x):
        """Mean and variance of x_t, and the path."""
        p = self.transport.point(t, x)
        return p.alpha * MEAN, p.alpha**2 * STD**2 + p.sigma**2, p

    def __call__(self, x, t, y=None, r=None):
        mean, variance, p = self.moments(t, x)
        if self.prediction == "score":
            return (mean - x) / variance
        if self.prediction == "noise":
            return p.sigma * (x - mean) / variance
        if r is None or torch.equal(r, t):
            growth = (p.alpha * p.d_alpha * STD**2 + p.sigma * p.d_sigma) / variance
            return p.d_alpha * MEAN + growth * (x - mean)
        return (self.flow(x, t, r) - x) / (r - t).view_as(p.alpha)

    def flow(self, x, t, r):
        """Where the flow takes x from time t to time r."""
        (mean, variance, _), (later_mean, later_variance, _) = self.moments(t, x), self.moments(r, x)
        return later_mean + (later_variance / variance).sqrt() * (x - mean)

    def to_data(self, noise):
        return self.flow(noise, *(torch.full((len(noise),), t, dtype=noise.dtype) for t in (0.0, 1.0)))


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture
def kit():
    return SimpleNamespace(Gaussian=Gaussian, mean=MEAN, std=STD)
