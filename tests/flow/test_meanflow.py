"""MeanFlow's loss and gradients, compared with the paper's formulas, in the paper's time, on a plain transformer."""

import pytest
import torch
import torch.nn.functional as F
from golden_values import arr, close, fill

from ditfast.flow import MeanFlow
from ditfast.models import DiT, modulate

TINY = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=32, depth=2, num_heads=2, num_classes=5)
NULL = 5
GUIDED = {"guidance": 2.0, "guidance_mix": 0.5, "guidance_interval": (0.0, 0.6), "null_label": NULL}


def plain(model, x, t, r, y):
    """The model's output from plain operations, with explicit attention."""
    x = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.r_embedder(r - t) + model.y_embedder.embedding_table(y)
    for block in model.blocks:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(6, dim=1)
        qkv = block.attn.qkv(modulate(block.norm1(x), shift_a, scale_a))
        q, k, v = qkv.unflatten(-1, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        x = x + gate_a.unsqueeze(1) * block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        h = block.mlp.fc1(modulate(block.norm2(x), shift_m, scale_m))
        x = x + gate_m.unsqueeze(1) * block.mlp.fc2(F.gelu(h, approximate="tanh"))
    final = model.final_layer
    shift, scale = final.adaLN_modulation(c).chunk(2, dim=1)
    return model.unpatchify(final.linear(modulate(final.norm_final(x), shift, scale)))[:, : model.in_channels]


def papers_loss(model, x1, t, r, y, noise, guided):
    """Time goes from data, 0, to noise, 1; r <= t; the velocity is noise - data."""
    t, r = 1 - t, 1 - r

    def u(z, t, r, y=y):
        return -plain(model, z, 1 - t, 1 - r, y)

    at = t.view(-1, 1, 1, 1)
    z, v = (1 - at) * x1 + at * noise, noise - x1
    with torch.no_grad():
        if guided:
            mixed = 2.0 * v + 0.5 * u(z, t, t) + (1 - 2.0 - 0.5) * u(z, t, t, torch.full_like(y, NULL))
            v = torch.where(((t >= 0.4) & (y != NULL)).view_as(at), mixed, v)
    out, change = torch.func.jvp(u, (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
    error = out - (v - (at - r.view_as(at)) * change).detach()
    total = error.square().sum((1, 2, 3))
    return total / (total.detach() + 0.01), error.detach().square().mean((1, 2, 3))


@pytest.fixture
def batch():
    x1, noise = arr("x1", (4, 2, 4, 4)), arr("noise", (4, 2, 4, 4))
    t, r = torch.tensor([0.0, 0.3, 0.5, 0.9]), torch.tensor([1.0, 0.3, 0.7, 0.95])
    return x1, t, r, torch.tensor([0, 3, NULL, 4]), noise


def gradients(model, loss):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_loss_and_gradients(batch, dtype, rtol, learn_sigma, guided):
    model = fill(DiT(**TINY, second_time=True, learn_sigma=learn_sigma)).to(dtype).eval()
    x1, t, r, y, noise = (each.to(dtype) if each.is_floating_point() else each for each in batch)
    mean_flow = MeanFlow(**(GUIDED if guided else {}))
    terms = mean_flow.training_losses(model, x1, {"y": y}, t=t, r=r, noise=noise)
    loss, mse = papers_loss(model, x1, t, r, y, noise, guided)
    close({"loss": terms["loss"], "mse": terms["mse"]}, {"loss": loss, "mse": mse}, rtol)
    got, expected = gradients(model, terms["loss"].sum()), gradients(model, loss.sum())
    assert all(value.any() for value in expected.values())
    close(got, expected, rtol)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_weights(batch, power):
    model = fill(DiT(**TINY, second_time=True)).eval()
    x1, t, r, y, noise = batch
    terms = MeanFlow(adaptive_power=power).training_losses(model, x1, {"y": y}, t=t, r=r, noise=noise)
    total = terms["mse"] * x1[0].numel()
    torch.testing.assert_close(terms["loss"], total / (total + 0.01) ** power)


def test_without_an_interval_it_is_flow_matching(batch):
    from ditfast.flow import create_transport

    model = fill(DiT(**TINY, second_time=True)).eval()
    x1, t, _, y, noise = batch
    mean = MeanFlow(adaptive_power=0).training_losses(model, x1, {"y": y}, t=t, noise=noise)
    flow = create_transport().training_losses(model, x1, {"y": y}, t=t, noise=noise)
    torch.testing.assert_close(mean["mse"], flow["loss"])
    torch.testing.assert_close(mean["pred"], flow["pred"])


def test_a_model_without_a_second_time_is_rejected(batch):
    model, (x1, t, r, y, noise) = fill(DiT(**TINY)).eval(), batch
    with pytest.raises(ValueError, match="r must be None for a model with second_time=False"):
        MeanFlow().training_losses(model, x1, {"y": y}, t=t, r=r, noise=noise)
    with pytest.raises(ValueError, match="r must be None for a model with second_time=False"):
        MeanFlow().sample(model, noise, y)
