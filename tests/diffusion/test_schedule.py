"""Schedules, respacing, tables."""

from functools import reduce
from operator import add

import numpy as np
import pytest

from ditfast.diffusion import (
    GaussianDiffusion,
    create_diffusion,
    get_named_beta_schedule,
    noisiest_step,
    space_timesteps,
)
from ditfast.diffusion.schedule import SCHEDULES

hypothesis = pytest.importorskip("hypothesis")
given, st = hypothesis.given, hypothesis.strategies


@pytest.mark.parametrize("spec", [25, "25", [25], (25,), np.int64(25), np.array([25]), " 25 "])
def test_a_count_in_every_form(spec):
    assert space_timesteps(1000, spec) == space_timesteps(1000, "25")


def test_sections():
    kept = sorted(space_timesteps(300, "10,15,20"))
    first, second, third = kept[:10], kept[10:25], kept[25:]
    assert (first[0], first[-1]) == (0, 99)
    assert (second[0], second[-1]) == (100, 199)
    assert (third[0], third[-1]) == (200, 299)
    assert len(third) == 20
    assert space_timesteps(7, "3,2") == {0, 2, 3, 4, 6}  # the first section is the longer one: 0 to 3
    assert space_timesteps(10, "1,0,2") == {0, 7, 9}


def test_ties_round_like_the_originals_sum():
    """The middle of 21 steps: as a product it is 499.5, rounded to 500; as a sum of rounded strides, a bit less."""
    stride = 999 / 20
    summed = reduce(add, [stride] * 10)
    assert round(stride * 10) == 500 and round(summed) == 499
    kept = space_timesteps(1000, 21)
    assert 499 in kept and 500 not in kept


def test_ddim_keeps_a_whole_stride():
    assert space_timesteps(1000, "ddim25") == set(range(0, 1000, 40))
    assert space_timesteps(1000, "ddim1000") == set(range(1000))
    assert space_timesteps(1000, "ddim334") == set(range(0, 1000, 3))  # not a divisor, yet a whole stride


def test_ddim_keeps_any_number_evenly_spaced_from_0():
    for count in (2, 7, 30, 300, 600, 999):
        kept = sorted(space_timesteps(1000, f"ddim{count}"))
        gaps = np.diff([*kept, 1000])
        assert len(kept) == count and kept[0] == 0 and gaps.max() - gaps[:-1].min() <= 1
    assert space_timesteps(1000, "ddim1") == space_timesteps(1000, "1") == {999}


@given(st.data())
def test_sections_keep_both_ends(data):
    sizes = data.draw(st.lists(st.integers(2, 60), min_size=1, max_size=4))
    size = min(sizes)
    counts = [data.draw(st.integers(2, size)) for _ in sizes]
    total = size * len(sizes) + data.draw(st.integers(0, len(sizes) - 1))
    kept = sorted(space_timesteps(total, counts))
    assert len(kept) == len(set(kept)) == sum(counts)
    assert all(type(step) is int for step in kept)
    end = 0
    for i, count in enumerate(counts):
        start, end = end, end + size + (i < total % len(counts))
        section = [step for step in kept if start <= step < end]
        assert len(section) == count
        assert (section[0], section[-1]) == (start, end - 1)
        gaps = np.diff(section)
        assert gaps.max() - gaps.min() <= 1
    assert create_diffusion(counts, "squaredcos_cap_v2", diffusion_steps=total).timestep_map == kept


@pytest.mark.parametrize("spec", ["", "30", "ddim25", 1, "10,20,30"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_respacing_keeps_the_noise_levels(schedule, spec):
    full, diffusion = create_diffusion("", schedule), create_diffusion(spec, schedule)
    np.testing.assert_allclose(
        diffusion.alphas_cumprod, full.alphas_cumprod[diffusion.timestep_map], rtol=1e-9, atol=1e-15
    )
    assert diffusion.num_timesteps == len(diffusion.timestep_map) == len(diffusion.betas)
    assert diffusion.original_num_steps == 1000
    assert diffusion.use_timesteps == set(diffusion.timestep_map)
    np.testing.assert_array_equal(diffusion.original_betas, get_named_beta_schedule(schedule, 1000))


def test_nothing_to_respace():
    assert create_diffusion(None).timestep_map == create_diffusion("").timestep_map == list(range(1000))
    assert create_diffusion("", diffusion_steps=50).num_timesteps == 50


def test_one_step_is_the_last():
    diffusion = create_diffusion("1")
    assert diffusion.timestep_map == [999]
    assert all(np.isfinite(table).all() for table in diffusion._tables)
    assert diffusion.betas[0] == diffusion.large_variance[0] == pytest.approx(1 - 4.0358e-05)


def test_steps_up_to_the_last():
    """As if the process ended there, with its own noise levels."""
    full, diffusion = create_diffusion(""), create_diffusion("ddim25", last_step=499)
    assert diffusion.timestep_map == list(range(0, 500, 20)) and diffusion.original_num_steps == 1000
    np.testing.assert_allclose(diffusion.alphas_cumprod, full.alphas_cumprod[:500:20])
    assert create_diffusion("", last_step=499).timestep_map == list(range(500))


def test_the_noisiest_step_has_a_signal():
    for schedule, diffusion_steps, last in (
        ("linear", 1000, 999),
        ("linear", 4000, 3999),
        ("squaredcos_cap_v2", 1000, 995),
        ("squaredcos_cap_v2", 12, 10),
    ):
        betas = get_named_beta_schedule(schedule, diffusion_steps)
        ratios = np.sqrt(1 / np.cumprod(1 - betas) - 1)  # sigma / alpha
        assert noisiest_step(betas) == last and ratios[last] < 165
        assert (ratios[last + 1 :] > 165).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_agree_with_each_other(schedule):
    d = create_diffusion("50", schedule)
    assert d.alphas_cumprod_prev[0] == 1 and d.alphas_cumprod_next[-1] == 0
    np.testing.assert_array_equal(d.alphas_cumprod_prev[1:], d.alphas_cumprod[:-1])
    np.testing.assert_array_equal(d.alphas_cumprod_next[:-1], d.alphas_cumprod[1:])
    np.testing.assert_allclose(np.exp(d.posterior_log_variance_clipped[1:]), d.posterior_variance[1:])
    assert np.exp(d.posterior_log_variance_clipped[0]) == pytest.approx(d.posterior_variance[1])
    np.testing.assert_array_equal(d.large_variance[1:], d.betas[1:])
    # a weighted mean of x_0 and x_t preserves a constant if both are noise-free
    coefficients = d.posterior_mean_coef1 + d.posterior_mean_coef2 * d.sqrt_alphas_cumprod
    np.testing.assert_allclose(coefficients, np.sqrt(d.alphas_cumprod_prev))


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"noise_schedule": "linaer"},
            "noise_schedule must be one of linear, .*, got 'linaer'; did you mean 'linear'",
        ),
        ({"noise_schedule": "cos"}, "got 'cos'; did you mean 'squaredcos_cap_v2'"),
        ({"noise_schedule": 0}, "noise_schedule must be one of linear, squaredcos_cap_v2, got 0$"),
        ({"diffusion_steps": 20}, "diffusion_steps must be above 20 for noise_schedule 'linear', got 20"),
        ({"diffusion_steps": 0}, "diffusion_steps must be a positive integer, got 0"),
        ({"diffusion_steps": 10.0}, "diffusion_steps must be a positive integer, got 10.0"),
        ({"diffusion_steps": True}, "diffusion_steps must be a positive integer, got True"),
        ({"timestep_respacing": "ddim1001"}, "must be 'ddimN', N from 1 to 1000, got 'ddim1001'"),
        ({"timestep_respacing": "ddim"}, "timestep_respacing must be 'ddimN', N from 1 to 1000, got 'ddim'"),
        ({"timestep_respacing": "ddim0"}, "timestep_respacing must be 'ddimN', N from 1 to 1000, got 'ddim0'"),
        ({"last_step": 1000}, r"last_step must be in \[0, 999\], got 1000"),
        ({"last_step": -1}, r"last_step must be in \[0, 999\], got -1"),
        ({"timestep_respacing": 1001}, "timestep_respacing must keep at most the 1000 steps of a section, got 1001"),
        ({"timestep_respacing": "10,400,10"}, "at most the 333 steps of a section, got 400"),
        ({"timestep_respacing": "fast"}, "timestep_respacing must be counts, .*, got 'fast'"),
        ({"timestep_respacing": "10,,10"}, "timestep_respacing must be counts, .*, got '10,,10'"),
        ({"timestep_respacing": "0"}, "timestep_respacing must be counts, not all 0, .*, got '0'"),
        ({"timestep_respacing": -5}, "timestep_respacing must be counts, .*, got -5"),
        ({"timestep_respacing": [2.5]}, r"timestep_respacing must be counts, .*, got \[2.5\]"),
        ({"timestep_respacing": []}, r"timestep_respacing must be counts, .*, got \[\]"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        create_diffusion(**{"timestep_respacing": "", **changes})


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"betas": [0.1, float("nan")]}, "betas must be strictly between 0 and 1, got nan"),
        ({"betas": [0.1, 1.0]}, "betas must be strictly between 0 and 1, got 1.0"),
        ({"betas": [0.0, 0.1]}, "betas must be strictly between 0 and 1, got 0.0"),
        ({"betas": [[0.1]]}, r"betas must have shape \(T,\) with T >= 1, got \(1, 1\)"),
        ({"betas": []}, r"betas must have shape \(T,\) with T >= 1, got \(0,\)"),
        ({"use_timesteps": [0, 2]}, r"use_timesteps must hold steps in \[0, 1\], got \[0, 2\]"),
        ({"use_timesteps": [-1]}, r"use_timesteps must hold steps in \[0, 1\], got \[-1\]"),
        ({"use_timesteps": set()}, r"use_timesteps must hold steps in \[0, 1\], got set\(\)"),
    ],
)
def test_constructor_errors(changes, message):
    kinds = {"model_mean_type": None, "model_var_type": None, "loss_type": None}
    with pytest.raises(ValueError, match=message):
        GaussianDiffusion(**{"betas": [0.1, 0.2], **kinds, **changes})
