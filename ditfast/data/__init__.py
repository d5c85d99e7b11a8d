"""Training data: sources of samples, and the stream of batches from one of them.

A source is an object with

    shape: tuple[int, int, int]   (C, H, W) of a sample as the model sees it: pixels in [-1, 1], or scaled latents
    num_classes: int
    classes: list[str]            their names, by label
    count: int | None             samples of one epoch; None: endless, sample i is made from its number
    identity: dict                what the data is, as JSON values; a checkpoint keeps it, and a run on other data
                                  is refused
    read(index, generator)        -> (x float32 (C, H, W), label int); chance, as a flip or the noise of a latent,
                                  comes from the torch.Generator alone. An item that is broken raises `Unreadable`.

`open_data` makes one of its name, and `ditfast.data.stream.stream_batches` reads it, in an order that follows from a
seed.
"""

from ditfast.data.errors import DataError, Unreadable
from ditfast.data.sources import open_data

__all__ = ["DataError", "Unreadable", "open_data"]
