"""Adapt models to other conventions of time and sign than `ditfast.flow`'s."""

from collections.abc import Callable

import torch


def diffusers_flow(model: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A model of velocities in the convention of diffusers' flow schedulers: f(x, timestep, **kwargs).

    There, a timestep is 1000 times the noise level, 1 - t, and velocities point from data to noise.
    """

    def predict(x, timestep, **kwargs):
        return -model(x, 1 - timestep / 1000, **kwargs)

    return predict


def paper_mean_flow(model: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A model of average velocities in the convention of MeanFlow's paper: u(z, r, t, **kwargs), r <= t.

    There, time runs from 0, data, to 1, noise; z is at time t, and z - (t - r) u at time r.
    """

    def average_velocity(z, r, t, **kwargs):
        return -model(z, 1 - t, r=1 - r, **kwargs)

    return average_velocity
