"""diffusers' schedulers drive the model."""

import sys

import pytest
import torch

from ditfast.diffusion import create_diffusion
from ditfast.diffusion.schedule import SCHEDULES
from ditfast.diffusion.schedulers import NAMES, make_scheduler, sample_with_scheduler, set_steps

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # from diffusers' use of numpy
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
    case = golden[tag]
    z = kit.arr(f"{tag}/z", tuple(case.values["x0"].shape))
    learned = case.model.learn_sigma
    scheduler = make_scheduler("ddim", create_diffusion("", learn_sigma=learned))
    options = {"noise": z, "model_kwargs": {"y": case.values["y"]}, "learn_sigma": learned}
    x = sample(case.model, scheduler, 25, z.shape, **options)
    kit.close(x, case.values["sample:ddim25:ddim"], 1e-4)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("predict_xstart", [False, True])
def test_ancestral_sampling_with_a_learned_variance_is_ddpm(predict_xstart, clip):
    """At every step that has a signal; with fewer steps, that scheduler interpolates to a different beta."""
    settings = {"predict_xstart": predict_xstart, "diffusion_steps": 12, "last_step": 10}
    diffusion = create_diffusion("", "squaredcos_cap_v2", **settings)
    scheduler = make_scheduler("DDPMScheduler", diffusion, variance_type="learned_range")

    def model(x, t):
        t = t.view(-1, 1, 1, 1)
        return torch.cat([0.8 * x, (x + t / 12).sin()], dim=1)

    noise = torch.randn(2, 3, 4, 4, generator=seeded(1))
    options = {"noise": noise, "clip_denoised": clip}
    x = sample(model, scheduler, 11, noise.shape, generator=seeded(), learn_sigma=True, **options)
    expected = diffusion.p_sample_loop(model, noise.shape, generator=seeded(), **options)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    assert (x.abs().max() <= 1) == clip


def test_a_model_of_x_start(kit):
    diffusion = create_diffusion("", predict_xstart=True, learn_sigma=False)
    scheduler = make_scheduler("dpm++", diffusion)
    assert scheduler.config.prediction_type == "sample"
    x = sample(lambda x, t: torch.full_like(x, 0.25), scheduler, 10, (2, 3, 4, 4), device="cpu")
    torch.testing.assert_close(x, torch.full_like(x, 0.25))


def test_scheduler_has_the_noise_levels_of_the_full_process():
    """Up to the last that is not pure noise."""
    for schedule, steps in (("linear", 1000), ("squaredcos_cap_v2", 996)):
        scheduler = make_scheduler("unipc", create_diffusion("10", schedule), solver_order=3)
        full = torch.from_numpy(create_diffusion("", schedule).alphas_cumprod)
        torch.testing.assert_close(scheduler.alphas_cumprod, full[:steps].float())
        assert scheduler.config.num_train_timesteps == steps
        assert scheduler.config.solver_order == 3
        set_steps(scheduler, 10)
        assert scheduler.timesteps[0] == steps - 1
    diffusion = create_diffusion("")
    assert make_scheduler("dpm++sde", diffusion).config.algorithm_type == "sde-dpmsolver++"


def unsure(x, t):
    """Predicts a variance, and noise that implies samples far beyond [-1, 1], with some inside."""
    noise = (3 * x + t.view(-1, 1, 1, 1) / 100).sin()
    return torch.cat([noise, noise], dim=1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_clipped_sample_is_that_of_ddim(schedule):
    """DDIM's own loop clamps the prediction; the scheduler is given adjusted noise instead."""
    diffusion, noise = create_diffusion("ddim25", schedule), torch.randn(2, 3, 4, 4, generator=seeded())
    x, free = (
        sample(unsure, make_scheduler("ddim", diffusion), 25, noise.shape, noise=noise, learn_sigma=True, **options)
        for options in ({"clip_denoised": True}, {})
    )
    torch.testing.assert_close(x, diffusion.ddim_sample_loop(unsure, noise.shape, noise), rtol=1e-4, atol=1e-4)
    assert (x - free).abs().max() > 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", NAMES)
def test_clipping(kit, name, schedule):
    """Brings samples into the data's range, and does not change those that never leave it."""
    diffusion, noise = create_diffusion("", schedule), torch.randn(2, 3, 4, 4, generator=seeded())

    def draw(model, clip):
        options = {"noise": noise, "generator": seeded(), "learn_sigma": model is unsure, "clip_denoised": clip}
        return sample(model, make_scheduler(name, diffusion), 20, noise.shape, **options)

    assert draw(unsure, False).abs().max() > 30
    assert draw(unsure, True).abs().max() < 1.2  # extrapolation by higher-order solvers is not clamped
    sure = kit.Gaussian(diffusion, mean=0.3, std=0.05)
    assert torch.equal(draw(sure, True), draw(sure, False))


@pytest.mark.parametrize("name, least", [("ddim", 2), ("pndm", 4)])
def test_equal_steps_fill_the_process(kit, name, least):
    """Otherwise a step would overshoot or fall short of the next."""
    diffusion = create_diffusion("", learn_sigma=False)
    model, scheduler = kit.Gaussian(diffusion), make_scheduler(name, diffusion)
    for steps, nearest in ((1, r"\d and \d"), (33, "25 and 40"), (600, "250 and 500"), (2000, "500 and 1000")):
        rule = f"divide 1000 and be at least {least} for {type(scheduler).__name__}, as {nearest} do, got {steps}"
        with pytest.raises(ValueError, match=rule):
            sample(model, scheduler, steps)
    x = sample(model, scheduler, 250, generator=seeded())
    assert x.std().item() == pytest.approx(0.5, rel=0.02) and x.mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("name, least", [("dpm++", 1), ("heun", 8), ("KDPM2DiscreteScheduler", 8)])
def test_steps_fit_the_noise_schedule(name, least):
    scheduler = make_scheduler(name, create_diffusion("", "squaredcos_cap_v2"))
    for steps in {least - 1, 997} - {0}:
        rule = f"from {least} to 996 for {type(scheduler).__name__} and this noise schedule, got {steps}"
        with pytest.raises(ValueError, match=rule):
            sample(None, scheduler, steps)


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
        ("FlowMatchEulerDiscreteScheduler", "class must have prediction_type and trained_betas, got 'FlowM"),
        ("IPNDMScheduler", "class must have prediction_type and trained_betas, got 'IPNDMScheduler'"),
        ("LCMScheduler", "must not be for distilled models, which have original_inference_steps, got 'LCMS"),
        ("CogVideoXDDIMScheduler", "must use the betas it is given, got 'CogVideoXDDIMScheduler', which"),
    ],
)
def test_unknown_schedulers(name, message):
    with pytest.raises(ValueError, match=message):
        make_scheduler(name, create_diffusion(""))


def test_incompatible_schedulers():
    with pytest.raises(ValueError, match="class must have .*, got FlowMatchEulerDiscreteScheduler"):
        sample(None, diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="class must have .*, got str"):
        sample(None, "unipc")
    with pytest.raises(ValueError, match="from noise to samples, got DDIMInverseScheduler, which goes the other"):
        sample(None, make_scheduler("DDIMInverseScheduler", create_diffusion("")))
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
        ({"noise": torch.zeros(1)}, r"noise must have the requested shape, \(64, 1, 8, 8\), got \(1,\)"),
    ],
)
def test_bad_input(kit, options, message):
    diffusion = create_diffusion("")
    with pytest.raises(ValueError, match=message):
        sample(kit.Gaussian(diffusion), make_scheduler("ddim", diffusion), **options)


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"make_scheduler needs diffusers: pip install 'ditfast\[sample\]'"):
        make_scheduler("ddim", create_diffusion(""))


def test_without_a_class_own_dependency(monkeypatch):
    """diffusers has a placeholder for it."""
    monkeypatch.setattr(diffusers.LMSDiscreteScheduler, "_backends", ["torch", "scipy"], raising=False)
    with pytest.raises(ImportError, match="LMSDiscreteScheduler needs torch and scipy"):
        make_scheduler("LMSDiscreteScheduler", create_diffusion(""))
