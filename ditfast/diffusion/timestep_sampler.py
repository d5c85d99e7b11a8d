"""Which timesteps to train on. Weights make every choice an unbiased estimate of the loss over all timesteps."""

import numpy as np
import torch
import torch.distributed as dist

from ditfast.suggest import did_you_mean


def create_named_schedule_sampler(name, diffusion):
    """The sampler called ``"uniform"`` or ``"loss-second-moment"``.

    Raises:
        ValueError: another name.
    """
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentResampler}
    if name in samplers:
        return samplers[name](diffusion)
    raise ValueError(
        f"schedule sampler must be one of {', '.join(samplers)}, got {name!r}{did_you_mean(name, samplers)}"
    )


class UniformSampler:
    """Every timestep of the diffusion alike."""

    def __init__(self, diffusion):
        self.num_timesteps = diffusion.num_timesteps

    def weights(self):
        return np.ones(self.num_timesteps)

    def sample(self, batch_size, device, generator=None):
        """Timesteps (B,) and the weights of their losses (B,), drawn on the device."""
        t = torch.randint(self.num_timesteps, (batch_size,), device=device, generator=generator)
        return t, torch.ones(batch_size, device=device)


class LossSecondMomentResampler:
    """Timesteps in proportion to the root mean square of their last losses; uniform until all have enough of these.

    Args:
        diffusion: its timesteps.
        history_per_term: how many losses of each timestep count.
        uniform_prob: share of the draws that stays uniform.

    Source: Nichol & Dhariwal 2021, equation 18.
    """

    def __init__(self, diffusion, history_per_term=10, uniform_prob=0.001):
        self.num_timesteps = diffusion.num_timesteps
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._losses = np.zeros((self.num_timesteps, history_per_term))  # the latest is the last
        self._counts = np.zeros(self.num_timesteps, dtype=np.int64)

    def weights(self):
        """How likely each timestep is: (T,), of any sum."""
        if (self._counts < self.history_per_term).any():
            return np.ones(self.num_timesteps)
        weights = np.sqrt((self._losses**2).mean(axis=1))
        weights = weights / weights.sum() if weights.any() else np.full(self.num_timesteps, 1 / self.num_timesteps)
        return weights * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def sample(self, batch_size, device, generator=None):
        """Timesteps (B,), drawn on the device, and the weights of their losses (B,): 1 / (T * probability)."""
        weights = self.weights()
        p = torch.from_numpy(weights / weights.sum()).float().to(device)
        t = torch.multinomial(p, batch_size, replacement=True, generator=generator)
        return t, 1 / (self.num_timesteps * p[t])

    def update_with_local_losses(self, local_ts, local_losses):
        """Record the losses (B,) at the timesteps (B,) of this process and all others, which must call it too."""
        mine = local_ts.tolist(), local_losses.tolist()
        everyone = [mine]
        if dist.is_available() and dist.is_initialized():
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, mine)
        for ts, losses in everyone:
            self.update_with_all_losses(ts, losses)

    def update_with_all_losses(self, ts, losses):
        """Record ``losses`` at ``ts``, as lists.

        Raises:
            ValueError: a loss that is not finite; nothing is recorded then.
        """
        if not np.isfinite(losses).all():
            raise ValueError(f"losses must be finite, got {losses}")
        for t, loss in zip(ts, losses, strict=True):
            self._losses[t] = np.append(self._losses[t, 1:], loss)
            self._counts[t] += 1
