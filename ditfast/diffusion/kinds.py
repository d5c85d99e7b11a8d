"""What a model predicts and how it is trained."""

import enum


class ModelMeanType(enum.Enum):
    """What the model's first C output channels predict."""

    START_X = enum.auto()  # the clean sample
    EPSILON = enum.auto()  # the noise


class ModelVarType(enum.Enum):
    """Where the variance of a reverse step comes from."""

    FIXED_SMALL = enum.auto()  # the posterior's
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # interpolated between the two by another C output channels


class LossType(enum.Enum):
    """The loss in `training_losses`."""

    MSE = enum.auto()  # squared error, plus the variational bound for a learned variance
    RESCALED_MSE = enum.auto()  # MSE, with the bound weighted by T / 1000
    KL = enum.auto()  # the variational bound alone
    RESCALED_KL = enum.auto()  # the bound times T: an estimate of the whole sum over timesteps
