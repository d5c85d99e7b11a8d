"""Latents that are not square."""

import numpy as np
import pytest
import torch

from ditfast.models import DiT, PatchEmbed, get_2d_sincos_pos_embed


@torch.no_grad()
@pytest.mark.parametrize("size", [(4, 12), (12, 4), (2, 32)])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_forward_against_plain_pytorch(kit, size, backend):
    model = kit.tiny(input_size=size, backend=backend)
    x, t, y = kit.batch(*size)
    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(y, False)
    for block in model.blocks:
        tokens = block(tokens, c)
    tokens = model.final_layer(tokens, c)  # (B, N, p*p*C)
    rows, columns = size[0] // 2, size[1] // 2
    expected = torch.zeros(4, 8, *size)
    for i in range(rows):
        for j in range(columns):
            patch = tokens[:, i * columns + j].reshape(4, 2, 2, 8).permute(0, 3, 1, 2)
            expected[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = patch
    torch.testing.assert_close(model(x, t, y), expected, rtol=0, atol=1e-5)


def test_position_of_a_rectangle():
    embed = get_2d_sincos_pos_embed(16, (2, 5)).reshape(2, 5, 16)
    square = get_2d_sincos_pos_embed(16, 5).reshape(5, 5, 16)
    np.testing.assert_array_equal(embed, square[:2])


def test_a_pair_of_equal_numbers_is_a_square(kit):
    kit.same(kit.tiny(input_size=(8, 8)), kit.tiny(input_size=8))


def test_training_a_rectangle(kit):
    model = kit.tiny(input_size=(4, 12)).train()
    model(*kit.batch(4, 12)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


def test_wrong_sizes(kit):
    with pytest.raises(ValueError, match=r"patch_size must divide input_size=\(4, 9\), got 2"):
        PatchEmbed((4, 9), 2, 4, 32)
    model = kit.tiny(input_size=(4, 12))
    with pytest.raises(ValueError, match=r"x must have shape .* = \(B, 4, 4, 12\), got \(4, 4, 12, 4\)"):
        model(*kit.batch(12, 4))
    with pytest.raises(ValueError, match=r"rows \* columns = N = 16"):
        model.unpatchify(torch.zeros(1, 16, 32))


def test_config_holds_every_argument(kit):
    model = kit.tiny(input_size=(4, 12))
    names = DiT.__init__.__code__.co_varnames[1 : DiT.__init__.__code__.co_argcount]
    assert tuple(model.config) == names
    assert DiT(**model.config).config == model.config
