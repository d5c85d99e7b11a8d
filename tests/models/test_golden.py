"""Values of the original implementation."""

import pytest
import torch

from ditfast.models import DiT, DiT_models

RTOL = 2e-5
TAGS = ("tiny64", "tiny72")


@pytest.fixture(params=TAGS)
def case(request, kit):
    values = kit.golden(f"dit_{request.param}")
    model = kit.fill(DiT(**kit.json(values["cfg"]))).eval()
    return request.param, values, model, [values[name] for name in "xty"]


def test_state_dict(case, kit):
    _, values, model, _ = case
    shapes = {name: list(p.shape) for name, p in model.state_dict().items()}
    assert shapes == kit.json(values["state_dict_keys"])
    assert not list(model.buffers())


def test_embeddings(case, kit):
    _, values, model, (x, t, y) = case
    kit.close(model.pos_embed.data, values["pos_embed"], RTOL)
    # if another machine's exp rounds a frequency differently, an angle of up to 999 changes by 2**-14
    kit.close(model.t_embedder.timestep_embedding(t, 256), values["t_freq"], 2.0**-14)
    kit.close(model.t_embedder(t), values["t_emb"], RTOL)
    kit.close(model.x_embedder(x) + model.pos_embed, values["tokens"], RTOL)
    dropped = model.y_embedder(y, False, force_drop_ids=torch.tensor([1] + [0] * (len(y) - 1)))
    kit.close(dropped, values["y_dropped_emb"], RTOL)


@torch.no_grad()
def test_output_and_tokens(case, kit):
    _, values, model, inputs = case
    kit.close(model(*inputs), values["out"], RTOL)
    blocks = range(len(model.blocks))
    out, hidden = model(*inputs, return_hidden=blocks)
    kit.close(out, values["out"], RTOL)
    for i in blocks:
        kit.close(hidden[i], values[f"block{i}"], RTOL)


@torch.no_grad()
def test_fractional_timesteps(case, kit):
    _, values, model, (x, t, y) = case
    kit.close(model(x, t + 0.25, y), values["out_t_fractional"], RTOL)


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance(case, kit, scale):
    _, values, model, (x, t, y) = case
    null = torch.full_like(y, model.y_embedder.num_classes)
    doubled = torch.cat([x, torch.randn_like(x)]), torch.cat([t, t]), torch.cat([y, null])  # second half: not read
    kit.close(model.forward_with_cfg(*doubled, scale), values[f"out_cfg_{scale}"], RTOL)


def test_gradients(case, kit):
    tag, values, model, (x, t, y) = case
    x.requires_grad_()
    out = model(x, t, y)
    (out * kit.arr(f"{tag}/w", tuple(out.shape))).mean().backward()
    kit.close(x.grad, values["grad_x"], RTOL)
    params = dict(model.named_parameters())
    whole = [key for key in values if key.startswith("grad:")]
    norms = [key for key in values if key.startswith("gradnorm:")]
    assert len(whole) == 5 and len(norms) == len(params) - 1  # all but pos_embed
    for key in whole:
        kit.close(params[key.removeprefix("grad:")].grad, values[key], RTOL)
    for key in norms:
        assert params[key.removeprefix("gradnorm:")].grad.norm().item() == pytest.approx(values[key].item(), rel=RTOL)


@torch.no_grad()
@pytest.mark.parametrize("name", ["DiT-S/8", pytest.param("DiT-XL/8", marks=pytest.mark.slow)])
def test_full_size(name, kit):
    key = name.replace("/", "-")
    values = kit.golden(f"full_{key}")
    with torch.device("meta"):
        model = DiT_models[name]()
    assert sum(p.numel() for p in model.parameters()) == values["params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == values["trainable"]
    pos_embed = DiT(patch_size=8, hidden_size=model.pos_embed.shape[-1], depth=0).pos_embed
    model = kit.fill(model.to_empty(device="cpu")).eval()
    model.pos_embed.copy_(pos_embed)
    out = model(kit.arr(f"{name}/x", (2, 4, 32, 32)), torch.tensor([17, 803]), torch.tensor([3, 1000]))
    kit.close(out.flatten()[::53], values["out_sampled"], RTOL)
    assert out.norm().item() == pytest.approx(values["out_norm"].item(), rel=RTOL)
