import numpy as np
import pytest
import torch

from ditfast.models import (
    LabelEmbedder,
    TimestepEmbedder,
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
    modulate,
)


def test_position_by_hand():
    embed = get_2d_sincos_pos_embed(16, 3)
    assert embed.shape == (9, 16) and embed.dtype == np.float64
    row, column = 2, 1
    omega = 10000.0 ** (-np.arange(4) / 4)
    along = [wave(place * omega) for place in (column, row) for wave in (np.sin, np.cos)]
    np.testing.assert_allclose(embed[row * 3 + column], np.concatenate(along), rtol=1e-12)


def test_extra_tokens_are_zero_rows_in_front():
    embed = get_2d_sincos_pos_embed(8, 2, cls_token=True, extra_tokens=3)
    assert not embed[:3].any()
    np.testing.assert_array_equal(embed[3:], get_2d_sincos_pos_embed(8, 2, extra_tokens=3))


def test_position_of_a_given_grid():
    columns, rows = np.array([[0.5, 1.5]]), np.array([[2.0, 3.0]])
    embed = get_2d_sincos_pos_embed_from_grid(8, np.stack([columns, rows]))
    np.testing.assert_array_equal(embed[:, :4], get_1d_sincos_pos_embed_from_grid(4, columns))
    np.testing.assert_array_equal(embed[:, 4:], get_1d_sincos_pos_embed_from_grid(4, rows))


@pytest.mark.parametrize("function", [get_1d_sincos_pos_embed_from_grid, get_2d_sincos_pos_embed_from_grid])
def test_odd_width(function):
    with pytest.raises(ValueError, match="embed_dim must be even, got 5"):
        function(5, np.zeros((2, 1)))


def test_timestep_by_hand():
    embed = TimestepEmbedder.timestep_embedding(torch.tensor([0.0, 2.5]), 7, max_period=100)
    omega = np.array([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)])
    expected = np.concatenate([np.cos(2.5 * omega), np.sin(2.5 * omega), [0]])  # odd: one zero
    np.testing.assert_allclose(embed[1], expected, rtol=1e-6)
    assert embed[0].tolist() == [1, 1, 1, 0, 0, 0, 0]


def test_a_replica_as_data_parallel_makes_it(kit):
    model, (x, t, y) = kit.tiny(), kit.batch()
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, p in module._parameters.items():  # a replica's tensors are not parameters
            if p is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, p.detach().clone())
    kit.close(replicas[model](x, t, y), model(x, t, y), 2e-6)


def test_labels_are_dropped_only_in_training():
    embedder = LabelEmbedder(5, 4, 0.25)
    labels = torch.arange(4000) % 5
    null = embedder.embedding_table.weight[5]
    torch.manual_seed(0)
    dropped = (embedder(labels, True) == null).all(dim=1)
    assert 0.22 < dropped.float().mean() < 0.28
    torch.manual_seed(0)
    assert torch.equal(dropped, torch.rand(4000) < 0.25)  # one draw per label, as in the original
    assert torch.equal(embedder(labels, False), embedder.embedding_table(labels))


@pytest.mark.parametrize("train", [True, False])
def test_labels_dropped_on_demand(train):
    embedder = LabelEmbedder(5, 4, 0.25)
    labels = embedder.token_drop(torch.tensor([3, 4, 0]), torch.tensor([0, 1, 0]))
    assert labels.tolist() == [3, 5, 0]
    out = embedder(torch.tensor([3, 4, 0]), train, force_drop_ids=torch.tensor([0, 1, 0]))
    assert torch.equal(out, embedder.embedding_table.weight[[3, 5, 0]])


def test_modulate_takes_shift_before_scale():
    x, shift, scale = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(modulate(x, shift, scale)[1, 2], x[1, 2] * (1 + scale[1]) + shift[1])
