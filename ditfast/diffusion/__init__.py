"""Gaussian diffusion with the original's API: the forward process, its learned reverse, losses and samplers.

A model is any callable ``model(x, t, **model_kwargs)``.
"""

from ditfast.diffusion.gaussian_diffusion import GaussianDiffusion, create_diffusion
from ditfast.diffusion.kinds import LossType, ModelMeanType, ModelVarType
from ditfast.diffusion.schedule import get_named_beta_schedule, noisiest_step
from ditfast.diffusion.spacing import space_timesteps
from ditfast.diffusion.timestep_sampler import (
    LossAwareSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_named_schedule_sampler,
)

__all__ = [
    "GaussianDiffusion",
    "LossAwareSampler",
    "LossSecondMomentResampler",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "ScheduleSampler",
    "UniformSampler",
    "create_diffusion",
    "create_named_schedule_sampler",
    "get_named_beta_schedule",
    "noisiest_step",
    "space_timesteps",
]
