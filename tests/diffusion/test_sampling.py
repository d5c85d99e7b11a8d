"""Samplers, checked on data whose noise predictor is known exactly."""

import copy
import pickle
import sys

import numpy as np
import pytest
import torch

from ditfast.diffusion import create_diffusion

SHAPE = (64, 2, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def loop(diffusion, sampler):
    return {"ddpm": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}[sampler]


@pytest.fixture
def case(kit):
    diffusion = create_diffusion("20", learn_sigma=False)
    return diffusion, kit.Gaussian(diffusion)


@pytest.mark.parametrize("sampler, eta", [("ddpm", None), ("ddim", 0.0), ("ddim", 1.0)])
def test_samples_have_the_distribution_of_the_data(kit, sampler, eta):
    diffusion = create_diffusion("250", learn_sigma=False, sigma_small=True)
    options = {} if eta is None else {"eta": eta}
    model = kit.Gaussian(diffusion, mean=0.3, std=0.5)
    x = loop(diffusion, sampler)(model, SHAPE, clip_denoised=False, generator=seeded(), **options)
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)


def test_full_noise_of_ddim_is_ddpm(case):
    diffusion, model = create_diffusion("20", learn_sigma=False, sigma_small=True), case[1]
    ddpm = diffusion.p_sample_loop(model, SHAPE, clip_denoised=False, generator=seeded())
    ddim = diffusion.ddim_sample_loop(model, SHAPE, clip_denoised=False, generator=seeded(), eta=1.0)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler, steps", [("ddpm", ""), ("ddim", "250")])
def test_classifier_guidance_gives_the_posterior(kit, sampler, steps):
    """Guided by the exact p(y | x_t) of a noisy measurement y of x_0, samples follow p(x_0 | y), a known normal."""
    mean, std, noise, y = 0.3, 0.5, 0.4, 1.0
    diffusion = create_diffusion(steps, learn_sigma=False, sigma_small=True)
    model = kit.Gaussian(diffusion, mean, std)

    def gradient(x, t, weight):
        a = model.alphas_cumprod[t].view(-1, 1, 1, 1)
        total = a * std**2 + 1 - a
        expected_x_start = mean + std**2 * a.sqrt() * (x - a.sqrt() * mean) / total
        slope = std**2 * a.sqrt() / total
        return weight * slope * (y - expected_x_start) / (std**2 * (1 - a) / total + noise**2)

    def weighted_model(x, t, weight):
        return model(x, t)

    x = loop(diffusion, sampler)(
        weighted_model,
        SHAPE,
        clip_denoised=False,
        cond_fn=gradient,
        model_kwargs={"weight": 1.0},
        device="cpu",
        generator=seeded(),
    )
    precision = 1 / std**2 + 1 / noise**2
    assert x.mean().item() == pytest.approx((mean / std**2 + y / noise**2) / precision, abs=0.02)
    assert x.std().item() == pytest.approx(precision**-0.5, rel=0.05)


def test_ddim_reverses_to_its_starting_point(kit):
    diffusion = create_diffusion("250", learn_sigma=False)
    model = kit.Gaussian(diffusion)
    start = x = 0.3 + 0.5 * torch.randn(4, 2, 8, 8, generator=seeded())
    for step in range(diffusion.num_timesteps - 1):  # there is no noise level after the last step
        t = torch.full((4,), step)
        x = diffusion.ddim_reverse_sample(model, x, t, clip_denoised=False)["sample"]
    assert (x - start).norm() > 0.5 * start.norm()
    assert x.std().item() == pytest.approx(1, abs=0.1)
    for step in reversed(range(diffusion.num_timesteps)):
        if step < diffusion.num_timesteps - 1:
            t = torch.full((4,), step)
            x = diffusion.ddim_sample(model, x, t + 1, clip_denoised=False)["sample"]
    error = (x - start).norm() / start.norm()
    assert error < 0.02


@torch.no_grad()
def test_one_step():
    """From pure noise straight to the model's estimate of x_0."""
    diffusion = create_diffusion("1", predict_xstart=True)
    seen = []

    def model(x, t):
        seen.append(t.tolist())
        return torch.cat([0.25 + 0 * x, 0 * x], dim=1)

    for sampler in ("ddpm", "ddim"):
        x = loop(diffusion, sampler)(model, (2, 3, 4, 4), device="cpu")
        torch.testing.assert_close(x, torch.full_like(x, 0.25))
    assert seen == [[999, 999]] * 2
    t = torch.zeros(2, dtype=torch.long)
    losses = diffusion.training_losses(model, torch.zeros(2, 3, 4, 4), t)
    bound = diffusion.calc_bpd_loop(model, torch.zeros(2, 3, 4, 4))
    assert torch.isfinite(losses["loss"]).all() and torch.isfinite(bound["total_bpd"]).all()


def test_clipping_and_denoised_fn(case):
    diffusion, _ = case
    x, t = torch.randn(2, 3, 4, 4, generator=seeded()), torch.tensor([3, 7])

    def model(x, t):
        return 5 * x

    raw = diffusion.p_mean_variance(model, x, t, clip_denoised=False)["pred_xstart"]
    assert raw.abs().max() > 2
    torch.testing.assert_close(diffusion.p_mean_variance(model, x, t)["pred_xstart"], raw.clamp(-1, 1))
    out = diffusion.p_mean_variance(model, x, t, denoised_fn=lambda x_start: x_start + 3)
    torch.testing.assert_close(out["pred_xstart"], (raw + 3).clamp(-1, 1))  # changed first, then clipped
    expected, _, _ = diffusion.q_posterior_mean_variance(out["pred_xstart"], x, t)
    torch.testing.assert_close(out["mean"], expected)


def test_second_output_of_the_model_is_passed_on(case):
    diffusion, model = case
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([1, 2])
    out = diffusion.p_mean_variance(lambda x, t: (model(x, t), "hidden"), x, t)
    assert out["extra"] == "hidden"
    assert diffusion.p_mean_variance(model, x, t)["extra"] is None


def test_predictions_invert_each_other(case):
    diffusion, _ = case
    x_start, noise = torch.randn(2, 4, 3, 4, 4, generator=seeded()).unbind()
    t = torch.tensor([0, 5, 12, 19])
    x_t = diffusion.q_sample(x_start, t, noise)
    torch.testing.assert_close(diffusion.predict_eps_from_xstart(x_t, t, x_start), noise, rtol=0, atol=2e-4)
    # at t = 19, x is almost pure noise: x_0's remainder is amplified by 1 / sqrt(alpha_bar) = 157
    torch.testing.assert_close(diffusion.predict_xstart_from_eps(x_t, t, noise), x_start, rtol=0, atol=2e-4)


def test_the_forward_process(case):
    diffusion, _ = case
    x_start, t = torch.full((2, 1, 100, 100), 0.5), torch.tensor([2, 15])
    mean, variance, log_variance = diffusion.q_mean_variance(x_start, t)
    x_t = diffusion.q_sample(x_start, t, generator=seeded())
    assert mean.shape == variance.shape == log_variance.shape == x_start.shape
    torch.testing.assert_close(log_variance.exp(), variance, rtol=1e-5, atol=0)
    torch.testing.assert_close(x_t.mean((1, 2, 3)), mean.mean((1, 2, 3)), rtol=0, atol=0.03)
    torch.testing.assert_close(x_t.var((1, 2, 3)), variance[:, 0, 0, 0], rtol=0.05, atol=0)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_generator_repeats_and_leaves_the_global_state(case, sampler):
    diffusion, model = case
    options = {"eta": 0.5} if sampler == "ddim" else {}
    before = torch.get_rng_state()
    a, b, c = (loop(diffusion, sampler)(model, (2, 3, 4, 4), generator=seeded(seed), **options) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    diffusion.q_sample(a, torch.tensor([1, 2]), generator=seeded())
    diffusion.calc_bpd_loop(model, a, generator=seeded())
    diffusion.training_losses(model, a, torch.tensor([1, 2]), generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)  # the default is torch's global generator, which draws the same
    torch.testing.assert_close(loop(diffusion, sampler)(model, (2, 3, 4, 4), **options), a, rtol=0, atol=0)


def test_a_generator_per_sample_makes_samples_independent_of_the_batch(case):
    diffusion, model = case
    together = diffusion.p_sample_loop(model, (3, 3, 4, 4), generator=[seeded(i) for i in (5, 6, 7)])
    alone = diffusion.p_sample_loop(model, (1, 3, 4, 4), generator=[seeded(6)])
    torch.testing.assert_close(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


def test_given_noise_is_the_start(case):
    diffusion, model = case
    noise = torch.randn(2, 3, 4, 4, generator=seeded())
    before = noise.clone()
    steps = list(diffusion.ddim_sample_loop_progressive(model, noise.shape, noise))
    first = diffusion.ddim_sample(model, noise, torch.full((2,), diffusion.num_timesteps - 1))
    torch.testing.assert_close(steps[0]["sample"], first["sample"])
    assert len(steps) == diffusion.num_timesteps
    assert torch.equal(noise, before)
    assert not steps[-1]["sample"].requires_grad
    torch.testing.assert_close(diffusion.ddim_sample_loop(model, noise.shape, noise), steps[-1]["sample"])


def test_arguments_by_position_are_those_of_the_original(case):
    """(model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)"""
    diffusion, model = case
    noise = torch.randn(2, 3, 4, 4, generator=seeded())
    by_name = diffusion.ddim_sample_loop(model, noise.shape, noise=noise, clip_denoised=False)
    by_position = diffusion.ddim_sample_loop(model, noise.shape, noise, False, None, None, {}, "cpu", False, 0.0)
    assert torch.equal(by_name, by_position)
    x = diffusion.p_sample_loop(model, noise.shape, noise, False, None, None, {}, "cpu", False)
    assert x.shape == noise.shape


def test_device_is_found(case):
    diffusion, model = case
    for each in (model, model.forward):
        assert diffusion.ddim_sample_loop(each, (1, 3, 4, 4)).device.type == "cpu"


def test_progress(case, monkeypatch, capsys):
    diffusion, model = case
    diffusion.p_sample_loop(model, (1, 3, 4, 4))
    assert not capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress=True needs tqdm: pip install tqdm"):
        diffusion.p_sample_loop(model, (1, 3, 4, 4), progress=True)
    monkeypatch.undo()
    pytest.importorskip("tqdm")
    diffusion.p_sample_loop(model, (1, 3, 4, 4), progress=True)
    assert "20/20" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_samples_keep_the_dtype_and_are_computed_in_no_less_than_fp32(case, dtype):
    diffusion, _ = case
    seen = []

    def model(x, t):
        seen.append(x.dtype)
        return 0.5 * x

    x, t = torch.randn(2, 3, 4, 4, generator=seeded()).to(dtype), torch.tensor([3, 7])
    assert diffusion.q_sample(x, t).dtype == dtype
    out = diffusion.p_mean_variance(model, x, t)
    assert out["mean"].dtype == torch.promote_types(dtype, torch.float32)
    expected = diffusion.p_mean_variance(model, x.double(), t)["mean"]
    torch.testing.assert_close(out["mean"].double(), expected, rtol=1e-5, atol=1e-5)
    for sampler in ("ddpm", "ddim"):
        assert loop(diffusion, sampler)(model, x.shape, x).dtype == dtype
    assert set(seen) == {dtype, torch.float64}


def test_training_after_inference_mode():
    """Tables first used in inference mode can be saved for backward."""
    diffusion = create_diffusion("10", learn_sigma=False)
    model = torch.nn.Conv2d(3, 3, 1)
    with torch.inference_mode():
        diffusion.p_sample_loop(lambda x, t: model(x), (1, 3, 4, 4), device="cpu")
    losses = diffusion.training_losses(lambda x, t: model(x), torch.zeros(2, 3, 4, 4), torch.tensor([0, 9]))
    losses["loss"].mean().backward()
    assert model.weight.grad.isfinite().all()


def test_copies_and_pickles(case):
    diffusion, model = case
    x, t = torch.zeros(2, 3, 4, 4), torch.tensor([1, 2])
    for other in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert torch.equal(other.p_mean_variance(model, x, t)["mean"], diffusion.p_mean_variance(model, x, t)["mean"])
        np.testing.assert_array_equal(other.betas, diffusion.betas)
