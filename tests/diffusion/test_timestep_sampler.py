"""Samplers of training timesteps."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ditfast.diffusion import (
    LossAwareSampler,
    LossSecondMomentResampler,
    ScheduleSampler,
    UniformSampler,
    create_diffusion,
    create_named_schedule_sampler,
)

DIFFUSION = create_diffusion("5")
BY_TIMESTEP = np.array([4.0, 0.0, 1.0, 2.0, 3.0])


def warm(history=3, **options):
    sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=history, **options)
    for _ in range(history):
        sampler.update_with_local_losses(torch.arange(5), torch.from_numpy(BY_TIMESTEP))
    return sampler


def test_names():
    assert isinstance(create_named_schedule_sampler("uniform", DIFFUSION), UniformSampler)
    assert isinstance(create_named_schedule_sampler("loss-second-moment", DIFFUSION), LossSecondMomentResampler)
    with pytest.raises(ValueError, match="must be one of uniform, .*, got 'unifrom'; did you mean 'uniform'"):
        create_named_schedule_sampler("unifrom", DIFFUSION)


def test_kinds():
    """Training loops ask whether a sampler wants the losses."""
    assert not isinstance(UniformSampler(DIFFUSION), LossAwareSampler)
    assert isinstance(LossSecondMomentResampler(DIFFUSION), LossAwareSampler)


def test_a_sampler_of_ones_own():
    class Late(ScheduleSampler):
        def weights(self):
            return np.array([0.0, 3.0, 1.0])

    t, weights = Late().sample(4000, "cpu", torch.Generator().manual_seed(0))
    np.testing.assert_allclose(np.bincount(t, minlength=3) / 4000, [0, 0.75, 0.25], atol=0.03)
    torch.testing.assert_close(weights, torch.tensor([0, 1 / (3 * 0.75), 1 / (3 * 0.25)])[t])


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_uniform_at_first(name):
    sampler = create_named_schedule_sampler(name, DIFFUSION)
    t, weights = sampler.sample(5000, "cpu", torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.ones(5000))
    np.testing.assert_allclose(np.bincount(t, minlength=5) / 5000, 0.2, atol=0.03)
    np.testing.assert_array_equal(sampler.weights(), np.ones(5))


@pytest.mark.parametrize("name", ["uniform", "loss-second-moment"])
def test_generator(name):
    sampler = create_named_schedule_sampler(name, DIFFUSION)
    before = torch.get_rng_state()
    a, b = (sampler.sample(50, "cpu", torch.Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(a, b) and torch.equal(torch.get_rng_state(), before)


def test_probabilities_follow_the_losses():
    sampler = warm(uniform_prob=0.1)
    expected = 0.9 * BY_TIMESTEP / 10 + 0.1 / 5
    np.testing.assert_allclose(sampler.weights(), expected)
    t, weights = sampler.sample(20000, "cpu", torch.Generator().manual_seed(0))
    np.testing.assert_allclose(np.bincount(t, minlength=5) / 20000, expected, atol=0.015)
    torch.testing.assert_close(weights, 1 / (5 * torch.from_numpy(expected).float()[t]))
    losses = torch.from_numpy(BY_TIMESTEP).float()[t] * weights
    assert losses.mean().item() == pytest.approx(BY_TIMESTEP.mean(), rel=0.02)  # unbiased


def test_uniform_until_every_timestep_has_its_history():
    sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=2)
    sampler.update_with_all_losses([0, 1, 2, 3, 4] + [0, 1, 2, 3], list(range(9)))
    np.testing.assert_array_equal(sampler.weights(), np.ones(5))
    sampler.update_with_all_losses([4], [9.0])
    assert sampler.weights()[4] > sampler.weights()[0]


def test_only_the_latest_losses_count():
    sampler = warm(uniform_prob=0.0)
    for loss in (3.0, 4.0, 5.0):
        sampler.update_with_all_losses([1], [loss])
    squares = BY_TIMESTEP**2
    squares[1] = (9 + 16 + 25) / 3
    np.testing.assert_allclose(sampler.weights(), np.sqrt(squares) / np.sqrt(squares).sum())


def test_losses_that_are_all_zero():
    sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=1)
    sampler.update_with_all_losses(range(5), [0.0] * 5)
    np.testing.assert_allclose(sampler.weights(), 0.2)


def test_losses_must_be_finite():
    sampler = warm()
    before = sampler.weights()
    with pytest.raises(ValueError, match=r"losses must be finite, got \[7.0, nan\]"):
        sampler.update_with_local_losses(torch.tensor([0, 1]), torch.tensor([7.0, float("nan")]))
    np.testing.assert_array_equal(sampler.weights(), before)


def test_losses_of_all_processes_are_recorded(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert np.all(warm().weights() == warm().weights()) and warm().weights()[0] > warm().weights()[1]
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)

        def gather(everyone, mine):
            everyone[:] = [mine, ([1, 1, 2], [5.0, 6.0, 7.0])]

        monkeypatch.setattr(dist, "all_gather_object", gather)
        sampler = LossSecondMomentResampler(DIFFUSION, history_per_term=1, uniform_prob=0.0)
        sampler.update_with_local_losses(torch.tensor([0, 3, 4]), torch.tensor([1.0, 2.0, 3.0]))
        np.testing.assert_allclose(sampler.weights(), np.array([1, 6, 7, 2, 3]) / 19)
    finally:
        dist.destroy_process_group()
