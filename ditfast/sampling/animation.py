"""An animation of sampling: what the model is given in its calls, and last the samples."""

import numpy as np
import torch

from ditfast.optional import import_optional
from ditfast.sampling import SampleError
from ditfast.sampling.decode import Decoder, to_uint8
from ditfast.sampling.files import GRID_LIMIT, SampleFolder, replace, tile_images

FRAMES = 50  # at most, without the samples
MILLISECONDS, LAST = 60, 2000  # per frame, and of the last one


class Animation:
    """Frames of the first `GRID_LIMIT` samples, of which each batch is sampled with ``watch``.

    Args:
        calls: the number of model calls per batch; some of more than `FRAMES` are left out.

    Raises:
        SampleError: there are too few calls, or their number is unknown.
    """

    def __init__(self, calls: int):
        if calls < 2:
            got = calls or "an adaptive --sampling-method"
            raise SampleError(f"--gif needs a fixed number of steps, at least 2, got {got}")
        self._chosen = {round(each) for each in np.linspace(0, calls - 1, min(calls, FRAMES))}
        self._frames: list[list[np.ndarray]] = [[] for _ in (*self._chosen, "samples")]
        self._calls, self._seen = 0, list[torch.Tensor]()  # of the current batch

    def watch(self, x: torch.Tensor) -> None:
        """Take note of x (B, C, S, S) of the next model call."""
        if self._calls in self._chosen:
            self._seen.append(x.clone())
        self._calls += 1

    @torch.no_grad()
    def add(self, pixels: np.ndarray, decoder: Decoder) -> None:
        """Add the batch that has been sampled: its images, uint8 (B, Hh, Ww, 3), and those of what was watched."""
        *frames, last = self._frames
        room = GRID_LIMIT - len(last)
        for frame, x in zip(frames, self._seen, strict=True):
            frame.extend(to_uint8(decoder(x[:room])))
        last.extend(pixels[:room])
        self._calls, self._seen = 0, []

    def write(self, path: str, folder: SampleFolder, columns: int | None, scale: int, overwrite: bool) -> None:
        """Write a GIF; see `tile_images`."""
        picture = import_optional("PIL.Image").fromarray
        first, *rest = (picture(tile_images(frame, columns, scale)) for frame in self._frames)
        times = [MILLISECONDS] * len(rest) + [LAST]
        options = {"format": "GIF", "save_all": True, "append_images": rest, "duration": times, "loop": 0}
        replace("--gif", path, folder, lambda part: first.save(part, **options), overwrite)
