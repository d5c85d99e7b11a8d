"""Conversion to and from diffusers' DiTTransformer2DModel."""

import json

import pytest
import torch

from ditfast.checkpoints import from_diffusers, load_into, match_original, patch_diffusers, to_diffusers
from ditfast.models import DiT

DiTTransformer2DModel = pytest.importorskip("diffusers").DiTTransformer2DModel

THEIRS = dict(
    num_attention_heads=4, attention_head_dim=8, num_layers=2, sample_size=8, num_embeds_ada_norm=5, out_channels=8
)


def tied(model):
    """Give every block the embedders of block 0, as in a converted model."""
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def theirs_like(kit, seed=3, **changes):
    return tied(kit.random(DiTTransformer2DModel(**{**THEIRS, **changes}), seed))


def ours_from(theirs):
    config, state = from_diffusers(dict(theirs.config), theirs.state_dict())
    model = DiT(**config)
    load_into(model, state)
    return model.eval()


def theirs_from(ours):
    config, state = to_diffusers(ours.config, ours.state_dict())
    model = DiTTransformer2DModel.from_config(config)
    model.load_state_dict(state)
    return model.eval()


def public(config):
    return {name: value for name, value in config.items() if not name.startswith("_")}


def error(ours, theirs, batch):
    """The largest difference at each of the four timesteps, relative to the largest output."""
    with torch.no_grad():
        got, expected = ours(*batch), theirs(*batch).sample
    return (got - expected).abs().amax(dim=(1, 2, 3)) / expected.abs().max()


@pytest.mark.parametrize("changes", [{}, {"out_channels": None, "patch_size": 4}, {"norm_eps": 1e-3}])
def test_from_diffusers_computes_the_same(kit, changes):
    theirs = theirs_like(kit, **changes)
    assert error(ours_from(theirs), theirs, kit.batch()).max() < 1e-5


def test_the_differences_are_real(kit):
    """Leaving either number at the original's value shows in the output; the frequencies do not at t = 0."""
    theirs = theirs_like(kit, norm_eps=1e-2)
    ours = ours_from(theirs)
    ours.t_embedder.freq_shift = 0
    found = error(ours, theirs, kit.batch())
    assert found[0] < 1e-5 and found[1:].min() > 1e-4
    ours = ours_from(theirs)
    ours.blocks[1].norm2.eps = 1e-6
    assert error(ours, theirs, kit.batch()).min() > 1e-4


@pytest.mark.parametrize("changes", [{}, {"learn_sigma": False, "depth": 1, "mlp_ratio": 4}, {"input_size": (8, 8)}])
def test_to_diffusers_computes_the_same_once_matched(kit, changes):
    ours = kit.tiny(**changes)
    theirs = theirs_from(ours)
    assert error(ours, theirs, kit.batch())[1:].min() > 1e-4  # diffusers' own frequencies
    match_original(theirs)
    assert error(ours, theirs, kit.batch()).max() < 1e-5


def test_matching_sets_both_numbers(kit):
    assert patch_diffusers is match_original  # its old name
    ours = kit.tiny(norm2_eps=1e-2)
    theirs = theirs_from(kit.tiny())
    match_original(theirs, norm2_eps=1e-2)
    assert error(ours, theirs, kit.batch()).max() < 1e-5


def test_the_round_trip_is_bit_equal(kit):
    theirs = theirs_like(kit, norm_eps=1e-3)
    ours = ours_from(theirs)
    again = theirs_from(ours)
    kit.same(again, theirs)
    assert public(again.config) == public(theirs.config)
    assert error(ours, again, kit.batch()).max() < 1e-5  # not matched: it has diffusers' frequencies
    back = ours_from(again)
    kit.same(back, ours)
    assert back.config == ours.config


def test_null_label(kit):
    ours = kit.tiny(class_dropout_prob=0.0)
    theirs = theirs_from(ours)
    match_original(theirs)
    x, t, _ = kit.batch()
    assert error(ours, theirs, (x, t, torch.tensor([4, 0, 1, 2]))).max() < 1e-5
    assert ours_from(theirs_like(kit)).y_embedder.embedding_table.weight.shape == (6, 32)  # label 5 is in kit.batch


def test_from_pretrained_reads_a_diffusers_folder(kit, tmp_path):
    theirs = theirs_like(kit)
    theirs.save_pretrained(tmp_path / "pipe" / "transformer")
    ours = DiT.from_pretrained(tmp_path / "pipe", subfolder="transformer")
    assert error(ours, theirs, kit.batch()).max() < 1e-5
    official = DiT.from_pretrained(tmp_path / "pipe" / "transformer", timestep_freq_shift=0, norm2_eps=1e-6)
    match_original(theirs)
    assert error(official, theirs, kit.batch()).max() < 1e-5


def test_from_pretrained_reads_the_old_format(kit, tmp_path):
    theirs = theirs_like(kit)
    torch.save(theirs.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    config = {**theirs.config, "_class_name": "Transformer2DModel"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert error(DiT.from_pretrained(tmp_path), theirs, kit.batch()).max() < 1e-5


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"activation_fn": "geglu"},
            "activation_fn must be 'gelu-approximate' to convert from diffusers, got 'geglu'",
        ),
        ({"attention_bias": False}, "attention_bias must be True"),
        ({"norm_type": "ada_norm"}, "norm_type must be 'ada_norm_zero'"),
        ({"out_channels": 5}, "out_channels must be in_channels=4 or twice that, got 5"),
        ({"num_layers": 3}, "transformer_blocks.2.norm1.linear.weight is missing"),
        ({"num_layers": 1}, "transformer_blocks.1.attn1.to_k.bias is unexpected"),
    ],
)
def test_features_that_a_dit_lacks(kit, changes, message):
    theirs = theirs_like(kit)
    with pytest.raises(ValueError, match=message):
        from_diffusers({**theirs.config, **changes}, theirs.state_dict())


def test_learned_position_is_not_dropped_silently(kit):
    ours = kit.tiny()
    ours.pos_embed.data[0, 3, 5] += 0.01
    with pytest.raises(ValueError, match="diffusers cannot express a pos_embed other than sines and cosines"):
        to_diffusers(ours.config, ours.state_dict())


def test_blocks_with_different_embedders(kit):
    theirs = theirs_like(kit)
    theirs.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.data[0, 0] += 1
    state = theirs.state_dict()
    with pytest.raises(ValueError, match=r"blocks.1.norm1.emb.class_embedder.\S+ differs from block 0's"):
        from_diffusers(dict(theirs.config), state)


@pytest.mark.parametrize(
    "changes", [{"conditioning": "adaln"}, {"mlp_ratio": 2.0}, {"input_size": (4, 16)}, {"depth": 0}]
)
def test_features_that_diffusers_lacks(kit, changes):
    ours = kit.tiny(**changes)
    with pytest.raises(ValueError, match=f"diffusers cannot express {next(iter(changes))}="):
        to_diffusers(ours.config, ours.state_dict())
