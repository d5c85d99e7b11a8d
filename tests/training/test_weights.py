"""AdamW, the average and the masters, compared with their definitions."""

import copy

import pytest
import torch

from ditfast import DiT
from ditfast.ops.backends import on_cpu
from ditfast.training.weights import Weights, norm_of

DECAY = 0.7


def build():
    torch.manual_seed(0)
    return DiT(input_size=6, in_channels=1, hidden_size=24, depth=2, num_heads=3, num_classes=4)


def fill(model, step):
    """Set gradients that depend on the step."""
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def never():
    return torch.zeros(())


def test_matches_pytorchs_adamw_and_a_loop():
    model, plain = build(), build()
    weights = Weights(model, 1e-2, 0.1)
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer, average = torch.optim.AdamW(trained, 1e-2, weight_decay=0.1), copy.deepcopy(plain)
    for step in range(3):
        for each in (model, plain):
            fill(each, step)
        weights.take_gradients()
        weights.update(1e-2, DECAY, never())
        optimizer.step()
        for kept, p in zip(average.parameters(), plain.parameters(), strict=True):
            kept.data = DECAY * kept.data + (1 - DECAY) * p.data
    for (name, p), expected, kept in zip(
        model.named_parameters(), plain.parameters(), average.parameters(), strict=True
    ):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
        if p.requires_grad:
            torch.testing.assert_close(weights.average[name], kept.detach(), rtol=1e-5, atol=1e-6)
            assert not torch.equal(weights.average[name], p)


@pytest.mark.parametrize("clip", [0.5, 1e3])
def test_gradients_are_clipped_as_by_pytorch(clip):
    model, plain = build(), build()
    weights = Weights(model, 1e-2, 0)
    trained = [p for p in plain.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2, weight_decay=0)
    for step in range(3):
        for each in (model, plain):
            fill(each, step)
        norm = norm_of(weights.take_gradients())
        weights.update(1e-2, DECAY, never(), scale=(norm / clip).clamp(min=1))
        torch.testing.assert_close(torch.nn.utils.clip_grad_norm_(trained, clip), norm)
        optimizer.step()
    moments = {name: weights.optimizer.state[value]["exp_avg"] for name, value in weights.masters.items()}
    for (name, p), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)
        if p.requires_grad:  # AdamW's step hardly depends on a gradient's scale, its moments do
            torch.testing.assert_close(moments[name], optimizer.state[expected]["exp_avg"], rtol=1e-4, atol=1e-7)


def test_masters_keep_what_bf16_would_lose():
    model, exact = build(), build()
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    weights, truth = Weights(model.bfloat16(), 1e-6, 0, masters), Weights(exact, 1e-6, 0)
    for step in range(4):
        for each in (model, exact):
            fill(each, step)
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            if p.requires_grad:
                q.grad = p.grad.float()
        for each in (weights, truth):
            each.take_gradients()
            each.update(1e-6, DECAY, never())
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(weights.masters[name], truth.masters[name])
    assert not torch.equal(weights.masters[name].bfloat16().float(), weights.masters[name])
    assert torch.equal(dict(model.named_parameters())[name], weights.masters[name].bfloat16())
    assert weights.average[name].dtype == torch.float32


@pytest.mark.parametrize("pure", [False, True])
def test_the_average_replaces_the_weights_temporarily(pure):
    model = build()
    masters = {name: p.detach().clone() for name, p in model.named_parameters()} if pure else None
    weights = Weights(model.bfloat16() if pure else model, 1e-1, 0, masters)
    fill(model, 0)
    weights.take_gradients()
    weights.update(1e-1, DECAY, never())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyError), weights.averaged():
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert torch.equal(p, weights.average[name].to(p.dtype)), name
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_with_and_without_the_extension(dtype, monkeypatch):
    """In float32 for gradients of any dtype."""
    gradients = [torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype) for size in (5, 0, 700)]
    exact = torch.cat(gradients).double().norm().float()
    for isa in (on_cpu.isa(), None):
        monkeypatch.setattr(on_cpu, "isa", lambda isa=isa: isa)
        norm = norm_of(gradients)
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm, exact, rtol=1e-6, atol=0)


def test_one_call_for_all_parameters():
    """However many parameters there are, a step takes the same few calls."""
    counts = []
    for depth in (1, 6):
        model = DiT(input_size=4, in_channels=1, hidden_size=8, depth=depth, num_heads=2, num_classes=4)
        weights = Weights(model, 1e-2, 0)
        fill(model, 0)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            weights.take_gradients()
            weights.update(1e-2, DECAY, never())
        calls = {event.key: event.count for event in profile.key_averages() if event.key.startswith("aten::_f")}
        counts.append((calls.get("aten::_fused_adamw_"), calls.get("aten::_foreach_lerp_")))
    assert counts == [(1, 1), (1, 1)]
