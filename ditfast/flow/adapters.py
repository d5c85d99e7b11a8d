"""Models in other conventions of time and sign than `ditfast.flow`'s."""


def diffusers_flow(model):
    """A model of velocities as diffusers' flow schedulers call it: f(x, timestep, **kwargs).

    There timesteps are 1000 times the noise level, 1 - t, and the velocity goes from data to noise.
    """

    def predict(x, timestep, **kwargs):
        return -model(x, 1 - timestep / 1000, **kwargs)

    return predict


def paper_mean_flow(model):
    """A model of average velocities as in MeanFlow's paper: u(z, r, t, **kwargs), r <= t.

    There time runs from 0, data, to 1, noise; z is at t, and z - (t - r) u is at r.
    """

    def average_velocity(z, r, t, **kwargs):
        return -model(z, 1 - t, r=1 - r, **kwargs)

    return average_velocity
