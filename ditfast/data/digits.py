"""Handwritten digits bundled with scikit-learn: small enough to train on a CPU, with nothing to download."""

from typing import Any

import torch

from ditfast.data.errors import DataError
from ditfast.optional import import_optional


class Digits:
    """The 1797 digits of scikit-learn's load_digits, in its order, never flipped.

    Source: Alpaydin and Kaynak 1998, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository.

    Args:
        image_size: must be 8.

    Attributes:
        shape: (1, 8, 8); background is -1, full ink is 1, in steps of 1/8.
        num_classes, classes, count, identity: see `ditfast.data.Source`.

    Raises:
        DataError: another size.
        ImportError: scikit-learn is not installed.
    """

    shape: tuple[int, int, int] = (1, 8, 8)
    num_classes = 10
    classes = list("0123456789")

    def __init__(self, image_size: int = 8):
        if image_size != 8:
            raise DataError(f"image_size of digits must be 8, got {image_size}")
        digits = import_optional("sklearn.datasets").load_digits()
        self._x = torch.from_numpy(digits.images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8) from 0 … 16
        self._y = digits.target.tolist()
        self.count = len(self._y)
        self.identity: dict[str, Any] = {"kind": "digits", "count": self.count, "classes": self.num_classes}

    def read(self, index: int, generator: torch.Generator) -> tuple[torch.Tensor, int]:
        """Digit ``index``, float32 (1, 8, 8), and its value; ``generator`` is unused."""
        return self._x[index], self._y[index]
