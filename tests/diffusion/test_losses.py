"""Training losses."""

import math

import pytest
import torch

from ditfast.diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType, create_diffusion
from ditfast.diffusion.diffusion_utils import discretized_gaussian_log_likelihood, normal_kl


class Output(torch.nn.Module):
    """A model whose output is its parameter."""

    def __init__(self, channels=6):
        super().__init__()
        self.output = torch.nn.Parameter(torch.linspace(-0.9, 0.9, 2 * channels * 16).view(2, channels, 4, 4))

    def forward(self, x, t):
        return self.output


X, NOISE = (torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 2).clamp(-1, 1)
T = torch.tensor([0, 7])


def losses(output=None, **options):
    diffusion = create_diffusion(**{"timestep_respacing": "50", **options})
    return diffusion.training_losses(output or Output(), X, T, noise=NOISE)


def test_the_bound_trains_the_variance_and_nothing_else():
    model = Output()
    losses(model)["vb"].sum().backward()
    mean, variance = model.output.grad.chunk(2, dim=1)
    assert torch.equal(mean, torch.zeros_like(mean))
    assert (variance != 0).all()


def test_the_squared_error_trains_the_mean_and_nothing_else():
    model = Output()
    losses(model)["mse"].sum().backward()
    mean, variance = model.output.grad.chunk(2, dim=1)
    assert torch.equal(variance, torch.zeros_like(variance))
    expected = 2 * (model.output[:, :3] - NOISE) / NOISE[0].numel()
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize("kind", [{}, {"use_kl": True}, {"predict_xstart": True}, {"learn_sigma": False}])
def test_gradients_flow_to_every_output(kind):
    model = Output(3 if kind == {"learn_sigma": False} else 6)
    losses(model, **kind)["loss"].mean().backward()
    assert model.output.grad.isfinite().all()
    assert (model.output.grad[1] != 0).all()  # at t = 0 an improbable sample's likelihood is clamped


def test_weights_of_the_bound():
    """With 50 steps, RESCALED_MSE weights it by 50 / 1000, RESCALED_KL by 50."""
    plain, rescaled, kl = losses(), losses(rescale_learned_sigmas=True), losses(use_kl=True)
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * 50 / 1000)
    torch.testing.assert_close(kl["loss"], plain["vb"] * 50)
    torch.testing.assert_close(plain["loss"], plain["mse"] + plain["vb"])
    torch.testing.assert_close(rescaled["loss"], rescaled["mse"] + rescaled["vb"])
    unscaled = GaussianDiffusion(
        betas=create_diffusion("50").betas,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE,
        loss_type=LossType.KL,
    )
    torch.testing.assert_close(unscaled.training_losses(Output(), X, T, noise=NOISE)["loss"], plain["vb"])


def test_kinds_of_create_diffusion():
    kinds = {
        LossType.MSE: {},
        LossType.RESCALED_MSE: {"rescale_learned_sigmas": True},
        LossType.RESCALED_KL: {"use_kl": True, "rescale_learned_sigmas": True},
    }
    for kind, options in kinds.items():
        assert create_diffusion("", **options).loss_type is kind
    assert create_diffusion("").model_mean_type is ModelMeanType.EPSILON
    assert create_diffusion("", predict_xstart=True).model_mean_type is ModelMeanType.START_X
    assert create_diffusion("", sigma_small=True).model_var_type is ModelVarType.LEARNED_RANGE
    assert create_diffusion("", learn_sigma=False).model_var_type is ModelVarType.FIXED_LARGE
    small = create_diffusion("", learn_sigma=False, sigma_small=True)
    assert small.model_var_type is ModelVarType.FIXED_SMALL


def test_the_model_gets_the_timesteps_of_the_full_process():
    seen = []

    def model(x, t, y):
        seen.append((t.tolist(), y))
        return torch.cat([x, x], dim=1)

    diffusion = create_diffusion("50")
    diffusion.training_losses(model, X, torch.tensor([0, 49]), {"y": 3})
    diffusion.p_mean_variance(model, X, torch.tensor([1, 48], dtype=torch.int32), model_kwargs={"y": 4})
    assert seen == [([0, 999], 3), ([diffusion.timestep_map[1], diffusion.timestep_map[48]], 4)]


def test_drawn_noise_is_noise():
    torch.manual_seed(0)
    loss = create_diffusion("", learn_sigma=False).training_losses(
        lambda x, t: torch.zeros_like(x), torch.zeros(4, 3, 64, 64), torch.tensor([0, 10, 500, 999])
    )
    torch.testing.assert_close(loss["loss"], torch.ones(4), rtol=0.05, atol=0)  # the mean square of the noise


def test_normal_kl():
    means, log_variances = torch.tensor([0.3, -1.0]), torch.tensor([-0.5, 0.7])
    a, b = (torch.distributions.Normal(m, (0.5 * v).exp()) for m, v in zip(means, log_variances, strict=True))
    expected = torch.distributions.kl_divergence(a, b)
    torch.testing.assert_close(normal_kl(means[0], log_variances[0], means[1], log_variances[1]), expected)


def test_discretized_likelihood():
    """The 256 bins hold all the probability; each bin's is the normal's, to the accuracy of the tanh."""
    bins = torch.linspace(-1, 1, 256)
    for mean, std in ((0.1, 0.2), (-0.95, 0.3), (0.0, 2.0)):
        args = torch.full_like(bins, mean), torch.full_like(bins, math.log(std))
        p = discretized_gaussian_log_likelihood(bins, *args).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-4)
        normal = torch.distributions.Normal(mean, std)
        upper, lower = normal.cdf(bins + 1 / 255), normal.cdf(bins - 1 / 255)
        upper[-1], lower[0] = 1, 0
        torch.testing.assert_close(p, upper - lower, rtol=0, atol=5e-4)


def test_outputs_of_low_precision_are_read_in_fp32():
    diffusion = create_diffusion("50")
    output = Output().output.detach().bfloat16()
    inputs = X.bfloat16(), T, None, NOISE.bfloat16()
    got = diffusion.training_losses(lambda x, t: output, *inputs)
    expected = diffusion.training_losses(lambda x, t: output.float(), *inputs)
    for name, value in expected.items():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name], value)


def test_the_bound_of_a_whole_process_keeps_no_graph():
    terms = create_diffusion("3").calc_bpd_loop(Output(), X)
    assert terms["vb"].shape == (2, 3)
    assert not any(term.requires_grad for term in terms.values())


def test_compiles_into_one_graph():
    diffusion = create_diffusion("50")

    def step(x, t, noise, output):
        return diffusion.training_losses(lambda x, t: output, x, t, noise=noise)["loss"]

    output = Output().output.detach()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X, T, NOISE, output), step(X, T, NOISE, output))
