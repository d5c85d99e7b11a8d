"""Streams of batches in an order determined by a seed, for any number of processes and from any position."""

import os
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from threading import Thread
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import DataLoader

from ditfast.data.errors import DataError, Unreadable
from ditfast.data.protocol import Source
from ditfast.seeds import ORDER, SAMPLE, derive_seed
from ditfast.signals import ENDING

MOST_WORKERS = 512  # processes per rank
GIVE_UP = 1000  # unreadable items in a row


class Batch(NamedTuple):
    """One rank's part of a batch."""

    x: torch.Tensor  # (b, C, H, W) float32
    y: torch.Tensor  # (b,) int64
    indices: torch.Tensor  # (b,) int64, of the items read
    skipped: list[str]  # one message per unreadable item


def stream_batches(
    source: Source,
    *,
    seed: int,
    start: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    unreadable: Literal["fail", "skip"] = "fail",
) -> Iterator[Batch]:
    """Endless batches of a source, from any position.

    Position g is item permutation(seed, g // count)[g % count], or item g of an endless source, and is read with a
    generator seeded from (seed, g). Batches may span epochs.

    Args:
        source: the data.
        seed: determines the order and the randomness of every sample.
        start: position of the first sample, which is the number of samples all ranks have read before.
        batch: B, samples over all ranks. Rank r gets positions r * b to (r + 1) * b - 1 of each B, b = B / world.
        rank, world: this rank and the number of ranks.
        workers: processes that read ahead; 0 reads in this process.
        unreadable: on a broken item, "fail" raises; "skip" reads the next readable item instead and appends the error
            to `Batch.skipped`.

    Returns:
        An iterator of `Batch`, in pinned memory if CUDA is available.

    Raises:
        DataError: an invalid argument; while iterating, nothing is readable, or a worker was killed.
        Unreadable: while iterating, naming the broken file.
    """
    if unreadable not in ("skip", "fail"):
        raise DataError(f"unreadable must be 'skip' or 'fail', got {unreadable!r}")
    if source.count is not None and source.count < 1:
        raise DataError("the data is empty")
    if batch < 1 or world < 1 or batch % world:
        raise DataError(f"batch must be a positive multiple of world, got batch {batch} and world {world}")
    if not 0 <= rank < world:
        raise DataError(f"rank must be in [0, {world - 1}], got {rank}")
    for name, value in (("start", start), ("workers", workers)):
        if value < 0:
            raise DataError(f"{name} must not be negative, got {value}")
    share = batch // world
    order = _shares(_Order(seed, source.count), start + rank * share, share, batch)
    return load_batches(_Reader(source, seed, skip=unreadable == "skip"), order, workers)


def load_batches(dataset: Any, order: Iterable[Sequence], workers: int) -> Iterator[Any]:
    """Yield dataset.__getitems__(each) for each list in ``order``; an exception that it returns is raised here.

    Raises:
        DataError: a worker was killed.
    """
    # with a private generator DataLoader does not touch the global one
    private, pin = torch.Generator(), torch.cuda.is_available()
    settings: dict[str, Any] = {"num_workers": workers, "pin_memory": pin, "generator": private}
    settings["worker_init_fn"] = _leave_signals_to_main
    try:
        with torch.device("cpu"):  # DataLoader would draw on the user's default device, with our CPU generator
            lists: Any = order  # or ranges, which DataLoader takes too
            loader = DataLoader(dataset, batch_sampler=lists, collate_fn=_identity, **settings)
            batches = iter(loader)
        for made in batches:
            if isinstance(made, Exception):
                raise made
            yield made
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        raise DataError(f"one worker of {workers} was killed: it may have run out of memory or /dev/shm") from error


def _shares(order, first, share, batch):
    """Yield (position, index) of each sample of this rank, batch by batch, endlessly."""
    while True:
        yield [(position, order.index(position)) for position in range(first, first + share)]
        first += batch


class _Order:
    """Position -> item: one permutation per epoch; caches the last one used."""

    def __init__(self, seed, count):
        self.seed, self.count, self.epoch = seed, count, None

    def index(self, position):
        if self.count is None:
            return position
        epoch, place = divmod(position, self.count)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, ORDER, epoch))
            self.epoch, self.items = epoch, torch.randperm(self.count, generator=generator, device="cpu")
        return int(self.items[place])


class _Reader:
    """Reads a `Batch` for given positions and indices; returns, rather than raises, errors for the user."""

    def __init__(self, source, seed, skip):
        self.source, self.seed, self.skip = source, seed, skip

    def __getitems__(self, pairs):
        skipped = []
        try:
            items = [self._read(position, index, skipped) for position, index in pairs]
        except (Unreadable, DataError) as error:
            return error  # raised in a worker, its message would be replaced by the worker's traceback
        x, y, indices = zip(*items, strict=True)
        y, indices = (torch.tensor(each, device="cpu") for each in (y, indices))
        return Batch(torch.stack(x), y, indices, skipped)

    def _read(self, position, index, skipped):
        """Returns (x, y, index) of the first readable item from ``index`` on."""
        first, count = len(skipped), self.source.count
        for _ in range(min(count or GIVE_UP, GIVE_UP)):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, SAMPLE, position))
            try:
                return *self.source.read(index, generator), index
            except Unreadable as error:
                if not self.skip:
                    raise
                skipped.append(str(error))
            index = index + 1 if count is None else (index + 1) % count
        tried = skipped[first:]
        raise DataError(f"nothing is readable: {len(tried)} items in a row failed, first: {tried[0]}")


def _leave_signals_to_main(worker):
    """Ignore signals sent to the whole process group, as by torchrun or Ctrl-C: the main process handles them."""
    for number in ENDING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Exit on SIGTERM from the main process only, which waits at exit until all its workers have ended."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def _identity(made):
    return made
