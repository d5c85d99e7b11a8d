"""What code for the original imports from its module of this name."""

from ditfast.diffusion.gaussian_diffusion import GaussianDiffusion as SpacedDiffusion
from ditfast.diffusion.spacing import space_timesteps

__all__ = ["SpacedDiffusion", "space_timesteps"]
