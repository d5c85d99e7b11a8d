"""Construction, initialization, parameters, and everything done to a model except running it."""

import copy
import pickle

import pytest
import torch
import torch.nn as nn

from ditfast.models import DiT, DiT_models, DiTBlock, presets

PARAMETERS = {  # millions
    "DiT-XL/2": 675.130, "DiT-XL/4": 675.074, "DiT-XL/8": 675.683,
    "DiT-L/2": 458.103, "DiT-L/4": 458.054, "DiT-L/8": 458.595,
    "DiT-B/2": 130.512, "DiT-B/4": 130.476, "DiT-B/8": 130.882,
    "DiT-S/2": 32.963, "DiT-S/4": 32.945, "DiT-S/8": 33.148,
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = DiT_models[name]()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == PARAMETERS[name]
    assert model.patch_size == int(name[-1])
    assert DiT_models[name] is getattr(presets, name.replace("-", "_").replace("/", "_"))


def test_state_dict_of_xl_2():
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"]()
    state = model.state_dict()
    assert len(state) == 292 and next(iter(state)) == "pos_embed"
    assert state["blocks.27.adaLN_modulation.1.weight"].shape == (6912, 1152)
    assert state["y_embedder.embedding_table.weight"].shape == (1001, 1152)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["pos_embed"]


def test_attributes():
    model = DiT(input_size=8, hidden_size=32, depth=1, num_heads=2)
    assert (model.learn_sigma, model.in_channels, model.out_channels) == (True, 4, 8)
    assert (model.patch_size, model.num_heads) == (2, 2)
    assert model.x_embedder.num_patches == 16 and model.x_embedder.patch_size[0] == 2
    assert model.t_embedder.frequency_embedding_size == 256
    assert (model.y_embedder.num_classes, model.y_embedder.dropout_prob) == (1000, 0.1)
    assert DiT(input_size=8, hidden_size=32, depth=0, num_heads=2, learn_sigma=False).out_channels == 4


def test_without_dropped_labels_there_is_no_null_label():
    model = DiT(input_size=8, hidden_size=32, depth=0, num_heads=2, num_classes=5, class_dropout_prob=0.0)
    assert model.y_embedder.embedding_table.weight.shape == (5, 32)


def test_initial_values():
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=192, depth=2, num_heads=2, num_classes=100)
    for name, p in model.named_parameters():
        gate = name.startswith("final_layer.linear") or ".adaLN_modulation.1." in name
        if gate or name.endswith("bias"):
            assert not p.any(), name
        elif name in ("t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight"):
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
            assert p.abs().max() > 0.06, name  # normal, not uniform
        elif name != "pos_embed":
            fan_out, fan_in = p.shape[0], p[0].numel()
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.95 * bound < p.abs().max() <= bound, name
            assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
    out = model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4]))
    assert not out.any()


def test_same_seed_gives_the_originals_weights():
    """Modules draw in this order on construction; then Linears in the tree's order, patches, labels, t."""
    torch.manual_seed(7)
    model = DiT(input_size=4, hidden_size=8, depth=2, num_heads=2, num_classes=3)

    torch.manual_seed(7)
    patches, labels = nn.Conv2d(4, 8, 2, 2), None
    time = [nn.Linear(256, 8), nn.Linear(8, 8)]
    labels = nn.Embedding(4, 8)
    widths = [(8, 24), (8, 8), (8, 32), (32, 8), (8, 48)]  # qkv, proj, fc1, fc2, adaLN
    blocks = [nn.Linear(*width) for _ in range(2) for width in widths]
    final = [nn.Linear(8, 32), nn.Linear(8, 16)]
    for linear in (*time, *blocks, *final):
        nn.init.xavier_uniform_(linear.weight)
    nn.init.xavier_uniform_(patches.weight.data.view(8, -1))
    nn.init.normal_(labels.weight, std=0.02)
    for linear in time:
        nn.init.normal_(linear.weight, std=0.02)

    expected = dict(zip(["qkv", "proj", "fc1", "fc2"], blocks[5:9], strict=True))
    block = model.blocks[1]
    got = {"qkv": block.attn.qkv, "proj": block.attn.proj, "fc1": block.mlp.fc1, "fc2": block.mlp.fc2}
    for name in expected:
        assert torch.equal(got[name].weight, expected[name].weight), name
    assert torch.equal(model.x_embedder.proj.weight, patches.weight)
    assert torch.equal(model.y_embedder.embedding_table.weight, labels.weight)
    assert torch.equal(model.t_embedder.mlp[2].weight, time[1].weight)


@torch.no_grad()
def test_meta_device_then_load(kit):
    expected = kit.tiny()
    with torch.device("meta"):
        model = kit.tiny()
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    kit.close(model(*kit.batch()), expected(*kit.batch()), 0)


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(kit, duplicate):
    model = kit.tiny(backend="reference")
    before = model(*kit.batch())
    ema = duplicate(model)
    assert ema.backend == "reference"
    for p in model.parameters():
        p.mul_(1.1)
    for average, p in zip(ema.parameters(), kit.tiny().parameters(), strict=True):
        average.lerp_(p, 0.5)
    kit.close(ema(*kit.batch()), before, 1e-6)
    assert (model(*kit.batch()) - before).abs().max() > 0.01


def test_presets_can_be_pickled():
    preset = DiT_models["DiT-B/4"]
    assert pickle.loads(pickle.dumps(preset)) is preset


@torch.no_grad()
@pytest.mark.parametrize("dtype, rtol", [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float64, 1e-5)])
def test_other_dtypes(kit, dtype, rtol):
    x, t, y = kit.batch()
    expected = kit.tiny()(x, t, y)
    out = kit.tiny().to(dtype)(x.to(dtype), t, y)
    assert out.dtype == dtype
    kit.close(out.float(), expected, rtol)


@torch.no_grad()
def test_timesteps_are_not_rounded_to_low_precision(kit):
    model = kit.tiny().to(torch.bfloat16)
    t = torch.tensor([512, 513])
    frequencies = model.t_embedder.timestep_embedding(t, 256).to(torch.bfloat16)
    assert not torch.equal(frequencies[0], frequencies[1])  # bfloat16 holds 512 and 514, not 513
    assert torch.equal(model.t_embedder(t), model.t_embedder.mlp(frequencies))


def test_block_arguments(kit):
    block = DiTBlock(32, 4, mlp_ratio=2.5, qk_norm=True, attn_drop=0.1, proj_drop=0.2)
    assert block.mlp.fc1.weight.shape == (80, 32)
    assert (block.attn.attn_drop.p, block.attn.proj_drop.p) == (0.1, 0.2)
    assert {"attn.q_norm.weight", "attn.k_norm.bias"} <= block.state_dict().keys()
    assert not {name for name in DiTBlock(32, 4).state_dict() if "norm" in name}


@torch.no_grad()
def test_runs_on_the_meta_device(kit):
    with torch.device("meta"):
        model = kit.tiny()
        x, t, y = torch.empty(3, 4, 10, 10), torch.empty(3), torch.zeros(3, dtype=torch.long)
    assert model(x, t, y).shape == (3, 8, 10, 10)
