"""Schedulers of diffusers drive the model."""

import sys

import pytest
import torch

from ditfast.diffusion import create_diffusion
from ditfast.diffusion.schedulers import NAMES, make_scheduler, sample_with_scheduler

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # of diffusers' use of numpy
SHAPE = (64, 1, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def sample(model, scheduler, steps=50, shape=SHAPE, **options):
    return sample_with_scheduler(model, scheduler, shape, steps, **{"learn_sigma": False, **options})


@pytest.mark.parametrize("name", [*NAMES, "DDPMScheduler", "KDPM2DiscreteScheduler", "DPMSolverSinglestepScheduler"])
def test_samples_have_the_distribution_of_the_data(kit, name):
    diffusion = create_diffusion("", learn_sigma=False)
    model = kit.Gaussian(diffusion, mean=0.3, std=0.5)
    x = sample(model, make_scheduler(name, diffusion), generator=seeded())
    assert x.mean().item() == pytest.approx(0.3, abs=0.03)
    # first-order solvers lose some of the spread: 6 to 12 % in 50 steps
    assert x.std().item() == pytest.approx(0.5, rel=0.13)


def test_solvers_of_higher_order_converge_faster(kit):
    diffusion = create_diffusion("", learn_sigma=False)
    model, errors = kit.Gaussian(diffusion), {}
    for name in ("euler", "dpm++", "unipc", "heun"):
        x = sample(model, make_scheduler(name, diffusion), steps=50, generator=seeded())
        errors[name] = abs(x.std().item() - 0.5)
    assert errors.pop("euler") > 3 * max(errors.values())


@pytest.mark.parametrize("tag", ["tiny64", "tiny72"])
def test_ddim_gives_the_samples_of_the_original(golden, kit, tag):
    """ "leading" spacing of 25 steps is "ddim25"."""
    case = golden[tag]
    z = kit.arr(f"{tag}/z", tuple(case.values["x0"].shape))
    learned = case.model.learn_sigma
    scheduler = make_scheduler("ddim", create_diffusion("", learn_sigma=learned), timestep_spacing="leading")
    options = {"noise": z, "model_kwargs": {"y": case.values["y"]}, "learn_sigma": learned}
    x = sample(case.model, scheduler, 25, z.shape, **options)
    kit.close(x, case.values["sample:ddim25:ddim"], 1e-4)


def test_ancestral_sampling_with_a_learned_variance_is_ddpm():
    """At every step of the process; with fewer steps that scheduler interpolates to another beta."""
    diffusion = create_diffusion("", "squaredcos_cap_v2", diffusion_steps=12)
    scheduler = make_scheduler("DDPMScheduler", diffusion, variance_type="learned_range")

    def model(x, t):
        t = t.view(-1, 1, 1, 1)
        return torch.cat([0.8 * x, (x + t / 12).sin()], dim=1)

    noise = torch.randn(2, 3, 4, 4, generator=seeded(1))
    x = sample(model, scheduler, 12, noise.shape, noise=noise, generator=seeded(), learn_sigma=True)
    expected = diffusion.p_sample_loop(model, noise.shape, noise, clip_denoised=False, generator=seeded())
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_a_model_of_x_start(kit):
    diffusion = create_diffusion("", predict_xstart=True, learn_sigma=False)
    scheduler = make_scheduler("dpm++", diffusion)
    assert scheduler.config.prediction_type == "sample"
    x = sample(lambda x, t: torch.full_like(x, 0.25), scheduler, 10, (2, 3, 4, 4), device="cpu")
    torch.testing.assert_close(x, torch.full_like(x, 0.25))


def test_scheduler_has_the_noise_levels_of_the_full_process():
    diffusion = create_diffusion("10", "squaredcos_cap_v2")
    scheduler = make_scheduler("unipc", diffusion, solver_order=3)
    full = create_diffusion("", "squaredcos_cap_v2")
    torch.testing.assert_close(scheduler.alphas_cumprod, torch.from_numpy(full.alphas_cumprod).float())
    assert scheduler.config.num_train_timesteps == 1000
    assert scheduler.config.solver_order == 3
    assert make_scheduler("dpm++sde", diffusion).config.algorithm_type == "sde-dpmsolver++"


def test_generator_and_step_options(kit):
    diffusion = create_diffusion("", learn_sigma=False)
    model, scheduler = kit.Gaussian(diffusion), make_scheduler("ddim", diffusion)
    small = (3, 1, 8, 8)
    before = torch.get_rng_state()
    a, b = (sample(model, scheduler, 5, small, generator=seeded(), eta=1.0) for _ in range(2))
    assert torch.equal(a, b)
    assert not torch.equal(a, sample(model, scheduler, 5, small, generator=seeded(), eta=0.0))
    per_sample = sample(model, scheduler, 5, small, generator=[seeded(i) for i in range(3)], eta=1.0)
    alone = sample(model, scheduler, 5, (1, 1, 8, 8), generator=[seeded(1)], eta=1.0)
    torch.testing.assert_close(per_sample[1:2], alone)
    assert torch.equal(torch.get_rng_state(), before)
    assert not a.requires_grad


def test_progress(kit, capsys):
    pytest.importorskip("tqdm")
    diffusion = create_diffusion("", learn_sigma=False)
    sample(kit.Gaussian(diffusion), make_scheduler("unipc", diffusion), 5, (1, 1, 4, 4), progress=True)
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, message",
    [
        ("dpm+", r"scheduler must be one of ddim, .*, got 'dpm\+'; did you mean 'dpm\+\+'"),
        ("EulerScheduler", "got 'EulerScheduler'; did you mean"),
        ("DiTPipeline", "got 'DiTPipeline'"),
        ("FlowMatchEulerDiscreteScheduler", "of a class that takes prediction_type and trained_betas, got 'FlowM"),
        ("IPNDMScheduler", "of a class that takes prediction_type and trained_betas, got 'IPNDMScheduler'"),
    ],
)
def test_unknown_schedulers(name, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, create_diffusion(""))


def test_schedulers_that_do_not_fit():
    with pytest.raises(ValueError, match="of a class that takes .*, got FlowMatchEulerDiscreteScheduler"):
        sample(None, diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="of a class that takes .*, got str"):
        sample(None, "unipc")
    scheduler = make_scheduler("ddim", create_diffusion(""), prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type must be 'epsilon' or 'sample', got 'v_prediction'"):
        sample(None, scheduler)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"steps": 0}, "steps must be a positive integer, got 0"),
        ({"steps": 2.0}, "steps must be a positive integer, got 2.0"),
        (
            {"learn_sigma": True},
            r"twice the channels of x, for learn_sigma=True: \(64, 2, 8, 8\), got \(64, 1, 8, 8\)",
        ),
        ({"noise": torch.zeros(1)}, r"noise must have the shape asked for, \(64, 1, 8, 8\), got \(1,\)"),
    ],
)
def test_bad_input(kit, options, message):
    diffusion = create_diffusion("")
    with pytest.raises(ValueError, match=message):
        sample(kit.Gaussian(diffusion), make_scheduler("ddim", diffusion), **options)


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"make_scheduler needs diffusers: pip install 'ditfast\[train\]'"):
        make_scheduler("ddim", create_diffusion(""))
