"""Digits, and how open_data interprets a name."""

import pytest
import torch

from ditfast.data import DataError, open_data

load_digits = pytest.importorskip("sklearn.datasets").load_digits


def test_digits_equal_scikit_learns_in_order():
    source, expected = open_data("digits"), load_digits()
    assert source.shape == (1, 8, 8) and source.num_classes == 10 and source.count == 1797
    for index in (0, 1, 700, 1796):
        x, y = source.read(index, None)
        assert x.shape == (1, 8, 8) and x.dtype == torch.float32
        assert y == expected.target[index] and type(y) is int
        assert ((x + 1) * 8)[0].tolist() == expected.images[index].tolist()
    everything = torch.stack([source.read(index, None)[0] for index in range(source.count)])
    assert everything.min() == -1 and everything.max() == 1


def test_identity_is_json():
    assert open_data("digits").identity == {"kind": "digits", "count": 1797, "classes": 10}


def test_glyphs_have_the_requested_size():
    assert open_data("glyphs", 24).shape == (1, 24, 24)
    assert open_data("glyphs").count is None


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("digits", 16), {}, "image_size of digits must be 8, got 16"),
        (("glyphs", 8), {}, "image_size of glyphs must be"),
        (("digits",), {"flip": True}, "digits takes image_size, got flip"),
        (("digitz",), {}, r"got 'digitz'; did you mean 'digits'\?"),
        (("Glyphs",), {}, r"got 'Glyphs'; did you mean 'glyphs'\?"),
    ],
)
def test_bad_names_and_options_are_one_line(arguments, options, message):
    with pytest.raises(DataError, match=message) as raised:
        open_data(*arguments, **options)
    assert "\n" not in str(raised.value)


def test_a_name_unlike_any_other_gets_no_suggestion():
    with pytest.raises(DataError, match="digits") as raised:
        open_data("zzzz")
    assert "mean" not in str(raised.value)
