"""Guidance from the model's side: what it is called with, and how often."""

import pytest
import torch

from ditfast import DiT
from ditfast.sampling import SampleError
from ditfast.sampling.flow import FlowSampler
from ditfast.sampling.sampler import SAMPLERS, Guidance, Sampler, sample
from ditfast.sampling.start import draw_start

FLOW = {"objective": "flow", "path_type": "Linear", "prediction": "velocity"}


@pytest.fixture
def model(ckpt):
    return DiT.from_pretrained(ckpt)


@pytest.fixture
def calls(model):
    """(time, labels, whether both halves get the same x) for each call of the model."""
    seen = []

    def note(module, args):
        x, t, y = args
        halves = x.chunk(2)
        seen.append((t[0].item() / 1000, y.tolist(), len(x) % 2 == 0 and torch.equal(*halves)))
        assert (t == t[0]).all()

    model.register_forward_pre_hook(note)
    return seen


def two(model, guidance, name="ddpm", steps=5, **options):
    starts = [draw_start(seed, (3, 8, 8), 7, label=label) for seed, label in ((5, 1), (6, 4))]
    return sample(model, Sampler(name, steps, True, False), guidance, starts, "cpu", **options)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_guidance_alone_doubles_the_batch_with_the_null_class(model, calls, scale):
    two(model, Guidance(scale, 0, 1, 3))
    assert len(calls) == 5
    for _, labels, twice in calls:
        assert (labels, twice) == (([1, 4, 7, 7], True) if scale > 1 else ([1, 4], False))


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_interval_applies_to_the_models_time(model, calls, name):
    two(model, Guidance(2.0, 0.2, 0.6, 3), name, steps=10)
    assert any(len(labels) == 4 for _, labels, _ in calls) and any(len(labels) == 2 for _, labels, _ in calls)
    for time, labels, _ in calls:
        assert len(labels) == (4 if 0.2 <= time <= 0.6 else 2)
    assert [time for time, *_ in calls] == pytest.approx(Sampler(name, 10, True, False).times)


def test_guidance_equals_the_papers(model):
    """One step from pure noise, computed by hand."""
    guided = two(model, Guidance(3.0, 0, 1, 2), steps=1)
    sampler = Sampler("ddpm", 1, True, False)
    noise = torch.stack([draw_start(seed, (3, 8, 8), 7).noise for seed in (5, 6)])
    t = torch.tensor(sampler.diffusion.timestep_map * 2)
    with torch.no_grad():
        given, null = model(noise, t, torch.tensor([1, 4])), model(noise, t, torch.tensor([7, 7]))
    eps = given[:, :3].clone()
    eps[:, :2] = null[:, :2] + 3 * (given[:, :2] - null[:, :2])
    kept = torch.tensor(sampler.diffusion.alphas_cumprod[0], dtype=torch.float32)
    torch.testing.assert_close(guided, (noise - (1 - kept).sqrt() * eps) / kept.sqrt(), rtol=1e-3, atol=1e-2)


def test_a_scale_per_sample_is_not_for_samplers(model, calls):
    with pytest.raises(SampleError, match="^guidance.scale must be a finite number, got tensor"):
        two(model, Guidance(torch.tensor([1.0, 2.0]), 0, 1, 3))
    assert not calls


@pytest.mark.parametrize("name, ticks", [("ddpm", 8), ("heun", 15)])
def test_every_call_is_reported(model, name, ticks):
    heard = []
    two(model, Guidance(1, 0, 1, 3), name, steps=8, tick=lambda x: heard.append(1))
    assert len(heard) == ticks == len(Sampler(name, 8, True, False).times)


@pytest.mark.parametrize("name", SAMPLERS)
def test_unclipped_samples_start_where_there_is_a_signal(model, calls, name):
    """On the cosine schedule, an unclamped prediction of x_0 is off by thousands at the noisiest steps."""
    starts = [draw_start(5, (3, 8, 8), 7)]
    for clip in (False, True):
        sampler = Sampler(name, 20, True, clip, "squaredcos_cap_v2")
        samples = sample(model, sampler, Guidance(1, 0, 1, 3), starts, "cpu", allow_mismatch=True)
        assert max(time for time, *_ in calls) <= 0.995 or clip and name == "ddpm"
        assert not clip or samples.abs().max() < 1.5
        calls.clear()


def test_branches_compute_in_the_dtype_and_samples_stay_float32(model):
    seen = []
    model.blocks[0].attn.qkv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        assert two(model, Guidance(1, 0, 1, 3), steps=1, dtype=dtype).dtype == torch.float32
        assert seen.pop() == dtype


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_steps_are_as_many_as_have_a_signal(name):
    assert len(Sampler(name, 996, True, False, "squaredcos_cap_v2").times) == 996
    assert len(Sampler(name, 1000, True, True, "squaredcos_cap_v2").times) == 1000
    with pytest.raises(SampleError, match=rf"^steps must be in \[1, 996\] for {name}, got 997$"):
        Sampler(name, 997, True, False, "squaredcos_cap_v2")


@pytest.mark.parametrize(
    "recorded, sampler, scale, message",
    [
        (
            {"objective": "diffusion", "noise_schedule": "squaredcos_cap_v2"},
            Sampler("ddim", 2, True, False),
            1,
            "the sampler's noise_schedule must be the model's, 'squaredcos_cap_v2', got 'linear'",
        ),
        (FLOW, Sampler("ddim", 2, True, False), 1, "the sampler's objective must be the model's, 'flow', got 'diff"),
        (
            FLOW,
            FlowSampler("euler", 2, {**FLOW, "path_type": "GVP"}),
            1,
            "the sampler's path_type must be the model's, 'Linear', got 'GVP'",
        ),
        (
            {"objective": "meanflow", "guidance": 2.5},
            FlowSampler("average", 2, {"objective": "meanflow"}),
            1.5,
            "guidance.scale must be 1 for a model trained to guide itself, by 2.5, got 1.5",
        ),
    ],
)
def test_a_sampler_for_another_model(model, calls, recorded, sampler, scale, message):
    model.sampling = recorded
    arguments = (model, sampler, Guidance(scale, 0, 1, 3), [draw_start(5, (3, 8, 8), 7)], "cpu")
    with pytest.raises(SampleError, match=message):
        sample(*arguments)
    assert not calls
    if recorded["objective"] == "diffusion":
        sample(*arguments, allow_mismatch=True)
        model.sampling = {}  # unknown
        sample(*arguments)
