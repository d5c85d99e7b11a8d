"""What a model predicts and how it is trained."""

import enum


class ModelMeanType(enum.Enum):
    """What the model's first C output channels are."""

    START_X = enum.auto()  # the clean sample
    EPSILON = enum.auto()  # the noise


class ModelVarType(enum.Enum):
    """Where the variance of a reverse step comes from."""

    FIXED_SMALL = enum.auto()  # the posterior's
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # C more output channels, which interpolate between the two


class LossType(enum.Enum):
    """What `training_losses` returns as the loss."""

    MSE = enum.auto()  # squared error, plus the variational bound for a learned variance
    RESCALED_MSE = enum.auto()  # the same, the bound weighted by T / 1000
    KL = enum.auto()  # the variational bound alone
    RESCALED_KL = enum.auto()  # the bound times T: an estimate of the whole sum over timesteps
