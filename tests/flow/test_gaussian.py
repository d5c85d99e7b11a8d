"""A flow to normal data, with known samples, moments, likelihoods, and steps of any length."""

import math

import pytest
import torch

from ditfast.flow import MeanFlow, Sampler, create_transport, sde
from ditfast.flow.adapters import diffusers_flow, paper_mean_flow
from ditfast.flow.schedulers import NAMES, make_scheduler, sample_with_scheduler
from ditfast.flow.times import shift_times

PATHS, PREDICTIONS = ("Linear", "GVP", "VP"), ("velocity", "noise", "score")
each_flow = pytest.mark.parametrize("path, prediction", [(a, b) for a in PATHS for b in PREDICTIONS])


def noise(count=2, dtype=torch.float64):
    return torch.randn(count, 3, 4, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))


def times(t, x):
    return torch.full((len(x),), t, dtype=x.dtype)


@each_flow
def test_the_three_predictions_agree(kit, path, prediction):
    model, exact = kit.Gaussian(path, prediction), kit.Gaussian(path)
    x = noise()
    t = torch.tensor([0.1, 0.95], dtype=x.dtype)
    transport, p = model.transport, model.transport.point(t, x)
    output = model(x, t)
    torch.testing.assert_close(transport.velocity(p, x, output), exact(x, t))
    torch.testing.assert_close(transport.score(p, x, output), kit.Gaussian(path, "score")(x, t))


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_of_the_path(kit, path):
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    point = kit.Gaussian(path).transport.point
    p, (_, d) = point(t, t), torch.func.jvp(lambda t: point(t, t), (t,), (torch.ones_like(t),))
    torch.testing.assert_close((p.d_alpha, p.d_sigma, p.rate), (d.alpha, d.sigma, d.alpha / p.alpha))


@each_flow
def test_the_ode_follows_the_flow(kit, path, prediction):
    """There and back, within the interval on which everything is finite."""
    model, x = kit.Gaussian(path, prediction), noise()
    sampler = Sampler(model.transport)
    low, high = model.transport.interval(model.transport.sample_eps)
    expected = model.flow(x, times(low, x), times(high, x))
    points = sampler.sample_ode(sampling_method="heun2", num_steps=400)(x, model)
    torch.testing.assert_close(points[-1], expected, rtol=0, atol=2e-3)
    back = sampler.sample_ode(sampling_method="heun2", num_steps=400, reverse=True)(expected, model)
    torch.testing.assert_close(back[-1], x, rtol=0, atol=1e-2)


def test_an_adaptive_ode_takes_the_steps_it_needs(kit):
    pytest.importorskip("torchdiffeq")
    model, x = kit.Gaussian("GVP"), noise(dtype=torch.float32)
    got = Sampler(model.transport).sample_ode(num_steps=2, rtol=1e-5)(x, model)
    torch.testing.assert_close(got[-1], model.to_data(x), rtol=0, atol=1e-4)
    assert got.dtype == torch.float32


FORMS = ["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]


@pytest.mark.parametrize("method", sde.METHODS)
@pytest.mark.parametrize("path, form", [("Linear", form) for form in FORMS] + [("GVP", "SBDM"), ("VP", "SBDM")])
def test_every_sde_has_the_same_marginals(kit, path, form, method):
    model, x = kit.Gaussian(path), noise(400, torch.float32)
    settings = {"sampling_method": method, "diffusion_form": form, "num_steps": 150, "last_step_size": 0.01}
    generator = torch.Generator().manual_seed(1)
    got = Sampler(model.transport).sample_sde(**settings, generator=generator)(x, model)[-1]
    assert abs(got.mean() - kit.mean) < 0.02 and abs(got.std() - kit.std) < 0.03
    assert abs(torch.corrcoef(torch.stack([got[:, 0].flatten(), got[:, 1].flatten()]))[0, 1]) < 0.03


@pytest.mark.parametrize("last_step", sde.LAST_STEPS)
@pytest.mark.parametrize("method", sde.METHODS)
def test_last_steps(kit, method, last_step):
    """Even if the end is data itself, and if the default diffusion is infinite at noise."""
    model, x = kit.Gaussian(), noise(100, torch.float32)
    settings = {"sampling_method": method, "last_step": last_step, "num_steps": 100}
    got = Sampler(model.transport).sample_sde(**settings, generator=torch.Generator().manual_seed(1))(x, model)
    assert len(got) == 100 and all(each.isfinite().all() for each in got)
    assert abs(got[-1].mean() - kit.mean) < 0.04 and abs(got[-1].std() - kit.std) < 0.04


def test_generators_of_each_sample(kit):
    """A sample's noise does not depend on its batch."""
    model, x = kit.Gaussian(), noise(2, torch.float32)

    def sample(rows):
        generators = [torch.Generator().manual_seed(i) for i in rows]
        sampler = Sampler(model.transport).sample_sde(num_steps=5, generator=generators)
        return sampler(x[rows], model)[-1]

    torch.testing.assert_close(sample([0, 1])[1:], sample([1]))


@each_flow
def test_likelihood(kit, path, prediction):
    pytest.importorskip("torchdiffeq")
    model, x = kit.Gaussian(path, prediction), kit.mean + kit.std * noise()
    log_p, z = Sampler(model.transport).sample_ode_likelihood(atol=1e-8, rtol=1e-6)(x, model)
    low, high = model.transport.interval(model.transport.sample_eps)
    mean, variance, _ = model.moments(times(high, x), x)
    exact = (-0.5 * (x - mean) ** 2 / variance - 0.5 * (2 * math.pi * variance).log()).flatten(1).sum(1)
    torch.testing.assert_close(z, model.flow(x, times(high, x), times(low, x)), rtol=0, atol=1e-4)
    # where the solver ends, x is standard normal only for the straight paths from 0
    torch.testing.assert_close(log_p, exact, rtol=0, atol=0.3 if low or path == "VP" else 1e-3)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_mean_flow_is_exact_in_any_number_of_steps(kit, steps):
    model, x = kit.Gaussian(), noise()
    torch.testing.assert_close(MeanFlow().sample(model, x, steps=steps), model.to_data(x))


def test_the_exact_average_velocity_solves_the_identity(kit):
    """Its loss with the conditional velocity is unbiased: the mean target is the prediction."""
    model = kit.Gaussian()
    count = 40_000
    draw = torch.Generator().manual_seed(0)
    x1 = kit.mean + kit.std * torch.randn(count, 1, dtype=torch.float64, generator=draw)
    start = torch.randn(count, 1, dtype=torch.float64, generator=draw)
    t, r = (torch.full((count,), value, dtype=torch.float64) for value in (0.3, 0.8))
    scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def scaled(x, t, r):
        return scale * model(x, t, r=r)

    terms = MeanFlow(adaptive_power=0).training_losses(scaled, x1, t=t, r=r, noise=start)
    terms["loss"].mean().backward()
    size = terms["pred"].detach().square().mean()
    assert abs(scale.grad) < 0.03 * size
    wrong = MeanFlow(adaptive_power=0).training_losses(lambda x, t, r: scale * model(x, t), x1, t=t, r=r, noise=start)
    scale.grad = None
    wrong["loss"].mean().backward()
    assert abs(scale.grad) > 0.1 * size  # the velocity itself does not


def test_the_papers_convention(kit):
    """z - (t - r) u is the flow, time from data, 0, to noise, 1."""
    model, z = kit.Gaussian(), noise()
    t, r = times(0.9, z), times(0.25, z)
    u = paper_mean_flow(model)(z, r, t)
    torch.testing.assert_close(z - 0.65 * u, model.flow(z, 1 - t, 1 - r))


def test_diffusers_convention(kit):
    model, x = kit.Gaussian(), noise()
    sigma = times(0.7, x)
    torch.testing.assert_close(diffusers_flow(model)(x, 1000 * sigma), -model(x, 1 - sigma))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", NAMES)
def test_flow_schedulers_of_diffusers(kit, name, shift):
    pytest.importorskip("diffusers")
    model, x = kit.Gaussian(), noise(dtype=torch.float32)
    got = sample_with_scheduler(model, make_scheduler(name, shift), x.shape, 60, x)
    torch.testing.assert_close(got, model.to_data(x), rtol=0, atol=0.1 if name == "flow-euler" else 0.03)


def test_more_steps_near_noise(kit):
    even = torch.linspace(0, 1, 5)
    shifted = shift_times(even, 3)
    noise_level = 1 - even
    torch.testing.assert_close(1 - shifted, 3 * noise_level / (1 + 2 * noise_level))
    assert shift_times(even, 1) is even and (shifted[1:-1] < even[1:-1]).all()
    model, x = kit.Gaussian(), noise()
    points = Sampler(model.transport).sample_ode(sampling_method="heun2", num_steps=50, time_shift=3.0)(x, model)
    torch.testing.assert_close(points[-1], model.to_data(x), rtol=0, atol=3e-3)


def test_times_to_train_on():
    def draw(**options):
        return create_transport(**options).draw_times(20_000, "cpu", torch.Generator().manual_seed(0))

    assert abs(draw().mean() - 0.5) < 0.01 and draw(prediction="noise").min() >= 1e-3
    normal = draw(time_sampling="logit-normal", time_mean=0.4, time_std=0.7).logit()
    assert abs(normal.mean() - 0.4) < 0.02 and abs(normal.std() - 0.7) < 0.02
    assert (draw(path_type="VP") <= 1 - 1e-5).all()
    torch.testing.assert_close(draw(time_shift=3.0), shift_times(draw(), 3.0))
    t, r = MeanFlow().draw_times(20_000, "cpu", torch.Generator().manual_seed(0))
    assert (t <= r).all() and abs((t < r).float().mean() - 0.25) < 0.01
