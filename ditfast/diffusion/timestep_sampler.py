"""Importance sampling of training timesteps. Loss weights keep the loss over all timesteps unbiased."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist

from ditfast.diffusion.gaussian_diffusion import GaussianDiffusion
from ditfast.suggest import did_you_mean


def create_named_schedule_sampler(name: str, diffusion: GaussianDiffusion) -> "ScheduleSampler":
    """Create the sampler named ``"uniform"`` or ``"loss-second-moment"``.

    Raises:
        ValueError: an unknown name.
    """
    samplers: dict[str, Callable[[GaussianDiffusion], ScheduleSampler]] = {
        "uniform": UniformSampler,
        "loss-second-moment": LossSecondMomentResampler,
    }
    if name in samplers:
        return samplers[name](diffusion)
    raise ValueError(
        f"schedule sampler must be one of {', '.join(samplers)}, got {name!r}{did_you_mean(name, samplers)}"
    )


class ScheduleSampler(ABC):
    """A distribution over timesteps; a subclass need only have `weights`."""

    @abstractmethod
    def weights(self) -> np.ndarray:
        """The relative probabilities of the timesteps, (T,)."""

    def sample(
        self, batch_size: int, device: str | torch.device, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw timesteps (B,) on the device, with the weights (B,) of their losses: 1 / (T * probability)."""
        weights = self.weights()
        p = torch.from_numpy(weights / weights.sum()).float().to(device)
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        return t, 1 / (len(p) * p[t])


class UniformSampler(ScheduleSampler):
    """Samples all timesteps of the diffusion with equal probability."""

    def __init__(self, diffusion: GaussianDiffusion):
        self.num_timesteps = diffusion.num_timesteps

    def weights(self) -> np.ndarray:
        """Ones (T,)."""
        return np.ones(self.num_timesteps)

    def sample(
        self, batch_size: int, device: str | torch.device, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw timesteps (B,) on the device, with the weights (B,) of their losses, 1."""
        t = torch.randint(self.num_timesteps, (batch_size,), device=device, generator=generator)
        return t, torch.ones(batch_size, device=device)


class LossAwareSampler(ScheduleSampler):
    """A distribution that follows the losses, the same on every process."""

    def update_with_local_losses(self, local_ts: torch.Tensor, local_losses: torch.Tensor) -> None:
        """Record the losses (B,) at the timesteps (B,) of all processes, each of which must call this."""
        mine = local_ts.tolist(), local_losses.tolist()
        everyone = [mine]
        if dist.is_available() and dist.is_initialized():
            everyone = [mine] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        for ts, losses in everyone:
            self.update_with_all_losses(ts, losses)

    @abstractmethod
    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Record ``losses`` at the timesteps ``ts``."""


class LossSecondMomentResampler(LossAwareSampler):
    """Samples timesteps in proportion to the RMS of their latest losses; uniformly until each has a full history.

    Args:
        diffusion: the process whose timesteps are sampled.
        history_per_term: number of losses kept per timestep.
        uniform_prob: fraction of the draws that stays uniform.

    Source: Nichol & Dhariwal 2021, equation 18.
    """

    def __init__(self, diffusion: GaussianDiffusion, history_per_term: int = 10, uniform_prob: float = 0.001):
        self.num_timesteps = diffusion.num_timesteps
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._losses = np.zeros((self.num_timesteps, history_per_term))  # latest last
        self._counts = np.zeros(self.num_timesteps, dtype=np.int64)

    def weights(self) -> np.ndarray:
        """The relative probabilities of the timesteps, (T,)."""
        if (self._counts < self.history_per_term).any():
            return np.ones(self.num_timesteps)
        weights = np.sqrt((self._losses**2).mean(axis=1))
        weights = weights / weights.sum() if weights.any() else np.full(self.num_timesteps, 1 / self.num_timesteps)
        return weights * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def update_with_all_losses(self, ts: Sequence[int], losses: Sequence[float]) -> None:
        """Record ``losses`` at the timesteps ``ts``.

        Raises:
            ValueError: a loss is not finite; nothing is recorded.
        """
        if not np.isfinite(losses).all():
            raise ValueError(f"losses must be finite, got {losses}")
        for t, loss in zip(ts, losses, strict=True):
            self._losses[t] = np.append(self._losses[t, 1:], loss)
            self._counts[t] += 1
