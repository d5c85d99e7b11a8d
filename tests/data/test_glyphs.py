import pytest
import torch

from ditfast.data import DataError
from ditfast.data.glyphs import CHARACTERS, FONTS, Glyphs, _maps, _uniforms


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [16, 21, 32])
def test_contract(size):
    glyphs = Glyphs(size)
    x, y = glyphs.read(3, seeded(0))
    assert x.shape == glyphs.shape == (1, size, size) and x.dtype == torch.float32
    assert isinstance(y, int) and y == 3 and glyphs.num_classes == len(set(CHARACTERS)) and glyphs.count is None
    assert glyphs.identity["image_size"] == size and glyphs.identity["classes"] == CHARACTERS


@pytest.mark.parametrize("size", [8, 15, 33, 64, 0, -16])
def test_bad_size_is_rejected(size):
    with pytest.raises(DataError, match=f"image_size .* from 16 to 32, got {size}$"):
        Glyphs(size)


def test_sample_depends_on_number_and_seed():
    glyphs = Glyphs()
    x, y = glyphs.read(45, seeded(1))
    again, label = Glyphs().read(45, seeded(1))
    assert torch.equal(x, again) and y == label == 45 % glyphs.num_classes
    other_seed, other_number = glyphs.read(45, seeded(2))[0], glyphs.read(65, seeded(1))[0]
    assert not torch.equal(x, other_seed) and not torch.equal(x, other_number)


def test_batch_equals_its_samples():
    glyphs = Glyphs(19)
    numbers = [0, 7, 2**40 + 3]
    x, y = glyphs.batch(numbers, seed=5)
    for i, number in enumerate(numbers):
        one, label = glyphs.batch([number], seed=5)
        torch.testing.assert_close(x[i : i + 1], one, rtol=0, atol=1e-5)
        assert y[i] == label[0] == number % glyphs.num_classes


def test_never_repeats_and_balances_classes():
    glyphs = Glyphs()
    x, y = glyphs.batch(range(4000), seed=0)
    assert len(x.flatten(1).unique(dim=0)) == 4000
    assert torch.equal(y.bincount(), torch.full((20,), 200))


@pytest.mark.parametrize("size", [16, 32])
def test_range_and_smooth_edges(size):
    x, _ = Glyphs(size).batch(range(400), seed=0)
    assert x.min() == -1 and x.max() == 1
    between = ((x > -0.99) & (x < 0.99)).float().mean()
    assert 0.03 < between < 0.30  # share of pixels on an edge, which is larger at low resolutions
    levels = ((x + 1) * 8).long().unique()
    assert len(levels) == 17  # every gray level
    assert max(x[:, :, 0].mean(), x[:, :, :, 0].mean()) < -0.9  # glyphs stay inside


def test_size_changes_only_the_resolution():
    """The same glyphs at 16² and 32²: averaged over blocks of 2², the large ones equal the small ones."""
    small, large = (Glyphs(size).batch(range(200), seed=0)[0] for size in (16, 32))
    difference = (torch.nn.functional.avg_pool2d(large, 2) - small).abs().mean()
    shifted = (torch.nn.functional.avg_pool2d(large.roll(2, -1), 2) - small).abs().mean()
    assert difference < 0.04 < shifted


def test_classes_can_be_told_apart():
    from sklearn.neighbors import KNeighborsClassifier

    glyphs = Glyphs()
    x, y = glyphs.batch(range(4000), seed=0)
    fresh, truth = glyphs.batch(range(1000), seed=1)
    score = KNeighborsClassifier(1).fit(x.flatten(1), y).score(fresh.flatten(1), truth)
    assert score > 0.78  # raw pixels, 0.84 measured; chance is 0.05


def test_fonts_have_the_characters():
    """In every font, most characters look like the same ones in another font."""
    maps = _maps().clamp(-0.1, 0.1).flatten(2)  # pixels far from an edge say little
    for i, name in enumerate(FONTS):
        others = torch.cat([maps[:i], maps[i + 1 :]]).flatten(0, 1)
        nearest = torch.cdist(maps[i], others).argmin(1) % len(CHARACTERS)
        assert (nearest == torch.arange(len(CHARACTERS))).float().mean() > 0.75, name  # all but two fonts: 1


def test_numbers_are_uniform_and_unrelated():
    import numpy as np

    draws = torch.from_numpy(_uniforms(np.arange(20000, dtype=np.uint64), seed=3, count=5)).double()
    assert draws.min() >= 0 and draws.max() < 1
    assert torch.allclose(draws.mean(0), torch.full((5,), 0.5).double(), atol=0.01)
    assert torch.allclose(draws.var(0), torch.full((5,), 1 / 12).double(), atol=0.003)
    both = torch.cat([draws[1:], draws[:-1]], 1).T  # of neighbouring samples
    assert (torch.corrcoef(both) - torch.eye(10).double()).abs().max() < 0.04
