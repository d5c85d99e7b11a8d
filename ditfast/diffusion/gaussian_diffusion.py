"""A Gaussian diffusion process and its reverse."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ditfast.diffusion import checks, equations, guidance, losses, samplers
from ditfast.diffusion.kinds import LossType, ModelMeanType, ModelVarType
from ditfast.diffusion.losses import mean_flat as mean_flat  # here in the original
from ditfast.diffusion.noise import Generators, noise_like
from ditfast.diffusion.schedule import Tables, check_betas, get_named_beta_schedule, make_tables
from ditfast.diffusion.spacing import respace, space_timesteps


def create_diffusion(
    timestep_respacing: str | int | Iterable[int] | None,
    noise_schedule: str = "linear",
    use_kl: bool = False,
    sigma_small: bool = False,
    predict_xstart: bool = False,
    learn_sigma: bool = True,
    rescale_learned_sigmas: bool = False,
    diffusion_steps: int = 1000,
    last_step: int | None = None,
) -> "GaussianDiffusion":
    """Create the diffusion process of a DiT.

    Args:
        timestep_respacing: which steps to keep, see `space_timesteps`; None or "" for all.
        noise_schedule: "linear" or "squaredcos_cap_v2".
        use_kl: train on the variational bound alone.
        sigma_small: without ``learn_sigma``, use the posterior's variance instead of beta.
        predict_xstart: the model predicts the clean sample instead of the noise.
        learn_sigma: the model also predicts a variance, in another C channels.
        rescale_learned_sigmas: weight the bound by T / 1000 when it is added to the squared error.
        diffusion_steps: T.
        last_step: only keep steps up to this one, as if T ended there, see `noisiest_step`; None for no limit.

    Raises:
        ValueError: an unknown schedule, or an invalid choice of steps.
    """
    betas = get_named_beta_schedule(noise_schedule, diffusion_steps)
    available = diffusion_steps if last_step is None else last_step + 1
    if not 1 <= available <= diffusion_steps:
        raise ValueError(f"last_step must be in [0, {diffusion_steps - 1}], got {last_step}")
    if timestep_respacing is None or (isinstance(timestep_respacing, str) and not timestep_respacing):
        timestep_respacing = available
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    squared = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    return GaussianDiffusion(
        betas=betas,
        use_timesteps=space_timesteps(available, timestep_respacing),
        model_mean_type=ModelMeanType.START_X if predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=LossType.RESCALED_KL if use_kl else squared,
    )


class GaussianDiffusion:
    """A forward process that turns samples into noise in T steps, and its learned reverse.

    Methods take timesteps t (B,) in [0, T) of *this* process; the model gets those of the full process. Means and
    variances are computed in float32 or better; samples keep the dtype of the input.

    Args:
        betas: variances of the full process's steps, each in (0, 1).
        model_mean_type, model_var_type, loss_type: see `kinds`.
        use_timesteps: the steps of the full process to keep; None for all.

    Attributes:
        num_timesteps: T.
        original_num_steps: number of steps of the full process.
        original_betas: its variances.
        timestep_map: the step in the full process for each t.
        betas, alphas_cumprod, …: float64 arrays (T,), one for every field of `schedule.Tables`.

    Raises:
        ValueError: betas out of range, or steps that do not exist.

    Source: Ho et al. 2020, "Denoising Diffusion Probabilistic Models"; Nichol & Dhariwal 2021, "Improved Denoising
    Diffusion Probabilistic Models"; Song et al. 2021, "Denoising Diffusion Implicit Models".
    """

    betas: np.ndarray
    alphas_cumprod: np.ndarray
    alphas_cumprod_prev: np.ndarray
    alphas_cumprod_next: np.ndarray
    sqrt_alphas_cumprod: np.ndarray
    sqrt_one_minus_alphas_cumprod: np.ndarray
    log_one_minus_alphas_cumprod: np.ndarray
    sqrt_recip_alphas_cumprod: np.ndarray
    sqrt_recipm1_alphas_cumprod: np.ndarray
    posterior_variance: np.ndarray
    posterior_log_variance_clipped: np.ndarray
    posterior_mean_coef1: np.ndarray
    posterior_mean_coef2: np.ndarray
    log_betas: np.ndarray
    large_variance: np.ndarray
    log_large_variance: np.ndarray

    def __init__(
        self,
        *,
        betas: npt.ArrayLike,
        model_mean_type: ModelMeanType,
        model_var_type: ModelVarType,
        loss_type: LossType,
        use_timesteps: Iterable[int] | None = None,
    ):
        self.original_betas = check_betas(betas)
        self.original_num_steps = len(self.original_betas)
        self.use_timesteps = set(range(self.original_num_steps) if use_timesteps is None else use_timesteps)
        self.timestep_map = sorted(self.use_timesteps)
        if not self.timestep_map or self.timestep_map[0] < 0 or self.timestep_map[-1] >= self.original_num_steps:
            raise ValueError(
                f"use_timesteps must hold steps in [0, {self.original_num_steps - 1}], got {use_timesteps!r}"
            )
        self.num_timesteps = len(self.timestep_map)
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self._tables = make_tables(respace(self.original_betas, self.timestep_map))
        self.__dict__.update(self._tables._asdict())
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def coefficients(self, t: torch.Tensor, x: torch.Tensor) -> Tables:
        """The tables at timesteps t (B,): float32 (B, 1, …), which broadcast with x (B, …).

        Raises:
            IndexError: on the CPU, t out of range. On a GPU, PyTorch's device-side assertion fails instead.
        """
        rows = _select(self._device_tables(x.device)[0], t)  # (B, K)
        return Tables(*rows.view(*rows.shape, *[1] * (x.dim() - 1)).unbind(1))

    def original_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """Map timesteps (B,) of this process to the full one, which the model was trained with."""
        return _select(self._device_tables(t.device)[1], t)

    def q_sample(
        self,
        x_start: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor | None = None,
        generator: Generators = None,
    ) -> torch.Tensor:
        """x_start (B, C, …) after t + 1 steps of noise.

        Args:
            noise: (B, C, …); drawn from ``generator`` if None.
        """
        c = self._gather("x_start", x_start, t)
        if noise is None:
            noise = noise_like(x_start, generator)
        checks.like("noise", noise, "x_start", x_start)
        return equations.x_t(c, x_start, noise).to(x_start.dtype)

    def q_mean_variance(self, x_start: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean, variance and log variance (B, C, …) of q(x_t | x_0). Source: Ho et al. 2020, equation 4."""
        c = self._gather("x_start", x_start, t)
        variance, log_variance = 1 - c.alphas_cumprod, c.log_one_minus_alphas_cumprod
        return c.sqrt_alphas_cumprod * x_start, variance.expand_as(x_start), log_variance.expand_as(x_start)

    def q_posterior_mean_variance(
        self, x_start: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Mean, variance and log variance, clipped at t = 0, of q(x_{t-1} | x_t, x_0).

        Source: Ho et al. 2020, equation 7.
        """
        c = self._gather("x_t", x_t, t)
        checks.like("x_start", x_start, "x_t", x_t)
        variance, log_variance = c.posterior_variance, c.posterior_log_variance_clipped
        return equations.posterior_mean(c, x_start, x_t), variance.expand_as(x_t), log_variance.expand_as(x_t)

    def predict_xstart_from_eps(self, x_t: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        return equations.x_start(self._gather("x_t", x_t, t), x_t, eps)

    def predict_eps_from_xstart(self, x_t: torch.Tensor, t: torch.Tensor, pred_xstart: torch.Tensor) -> torch.Tensor:
        return equations.eps(self._gather("x_t", x_t, t), x_t, pred_xstart)

    def p_mean_variance(
        self,
        model: Callable,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
        model_kwargs: dict | None = None,
    ) -> dict[str, Any]:
        """The model's reverse step p(x_{t-1} | x_t).

        Args:
            model: called as ``model(x, t, **model_kwargs)``, with t in the full process; returns (B, C or 2C, …), or
                a pair of that and any other output.
            x: (B, C, …) noisy samples.
            t: (B,) timesteps.
            clip_denoised: clamp the prediction of x_0 to [-1, 1].
            denoised_fn: applied to the prediction of x_0 before clamping.

        Returns:
            A dict of ``mean``, ``variance``, ``log_variance``, ``pred_xstart``, all (B, C, …), and ``extra``, the
            model's second output or None.
        """
        output, extra = self.call_model(model, x, t, model_kwargs)
        return {**self.read_output(output, x, t, clip_denoised, denoised_fn), "extra": extra}

    def call_model(
        self, model: Callable, x: torch.Tensor, t: torch.Tensor, model_kwargs: dict | None = None
    ) -> tuple[torch.Tensor, Any]:
        """The model's output, checked and in float32 or better, and its second output or None."""
        checks.floating("x", x)
        checks.timesteps(t, x)
        output = model(x, self.original_timesteps(t), **(model_kwargs or {}))
        output, extra = output if isinstance(output, tuple) else (output, None)
        checks.model_output(output, x, self.model_var_type is ModelVarType.LEARNED_RANGE)
        return output.to(torch.promote_types(output.dtype, torch.float32)), extra

    def read_output(
        self,
        output: torch.Tensor,
        x: torch.Tensor,
        t: torch.Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable | None = None,
    ) -> dict[str, torch.Tensor]:
        """`p_mean_variance` from a model output (B, C or 2C, …) instead of the model."""
        c = self.coefficients(t, x)
        prediction, log_variance, variance = self._split(output, c)
        pred_xstart = prediction
        if self.model_mean_type is ModelMeanType.EPSILON:
            pred_xstart = equations.x_start(c, x, prediction)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        return {
            "mean": equations.posterior_mean(c, pred_xstart, x),
            "variance": variance.expand_as(x),
            "log_variance": log_variance.expand_as(x),
            "pred_xstart": pred_xstart,
        }

    def _split(self, output, c):
        """The output's prediction, the log variance, the variance."""
        if self.model_var_type is ModelVarType.FIXED_SMALL:
            return output, c.posterior_log_variance_clipped, c.posterior_variance
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            return output, c.log_large_variance, c.large_variance
        prediction, v = output.chunk(2, dim=1)
        log_variance = equations.learned_log_variance(c, v)
        return prediction, log_variance, log_variance.exp()

    def _gather(self, name, x, t):
        checks.floating(name, x)
        checks.timesteps(t, x)
        return self.coefficients(t, x)

    def _device_tables(self, device):
        """All tables as one (T, K) in float32, and the timestep map (T,), copied to each device once."""
        if device not in self._on_device:
            tables = torch.from_numpy(np.stack(self._tables, axis=1)).float()
            steps = torch.tensor(self.timestep_map, device="cpu")
            self._on_device[device] = tables.to(device), steps.to(device)
        return self._on_device[device]

    condition_mean = guidance.condition_mean
    condition_score = guidance.condition_score
    training_losses = losses.training_losses
    vb_terms_bpd = losses.vb_terms_bpd
    calc_bpd_loop = losses.calc_bpd_loop
    p_sample = samplers.p_sample
    p_sample_loop = samplers.p_sample_loop
    p_sample_loop_progressive = samplers.p_sample_loop_progressive
    ddim_sample = samplers.ddim_sample
    ddim_sample_loop = samplers.ddim_sample_loop
    ddim_sample_loop_progressive = samplers.ddim_sample_loop_progressive
    ddim_reverse_sample = samplers.ddim_reverse_sample


def _select(table, t):
    """Rows of ``table`` (T, …) at t (B,). index_select also rejects negative steps, indexing does not."""
    try:
        return table.index_select(0, t)
    except IndexError:
        raise IndexError(f"t must be in [0, {len(table) - 1}], got values from {t.min()} to {t.max()}") from None
