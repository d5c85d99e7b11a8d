"""The order in which samples are read: it follows from a seed, on any number of processes and from any start."""

import os
import re
import signal
from collections.abc import Iterator
from threading import Thread
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader

from ditfast.data.errors import DataError, Unreadable
from ditfast.seeds import ORDER, SAMPLE, derive_seed
from ditfast.signals import ENDING

MOST_WORKERS = 512  # processes of a rank
GIVE_UP = 1000  # unreadable items in a row


class Batch(NamedTuple):
    x: torch.Tensor  # (b, C, H, W) float32
    y: torch.Tensor  # (b,) int64
    indices: torch.Tensor  # (b,) int64, of the items that were read
    skipped: list[str]  # what was unreadable


def stream_batches(
    source,
    *,
    seed: int,
    start: int,
    batch: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    unreadable: str = "fail",
) -> Iterator[Batch]:
    """Batches of a source without end, from any position.

    Position g is item permutation(seed, g // count)[g % count], or item g of an endless source, and is read with a
    generator seeded from (seed, g). A batch that does not fill an epoch runs on into the next one.

    Args:
        source: see `ditfast.data`.
        seed: of the order and of every sample's chance.
        start: position of the first sample: how many all ranks together have read before.
        batch: B, samples of all ranks together. Rank r gets the positions r * b to (r + 1) * b - 1 of each B, where
            b = B / world.
        workers: processes that read ahead; 0 reads in this one.
        unreadable: "fail" raises on a broken item. "skip" puts the next readable index in its place, and its text in
            `Batch.skipped`.

    Returns:
        An iterator of `Batch`, pinned where there is CUDA.

    Raises:
        DataError: an argument that does not fit, here; while iterating, nothing is readable, or a worker was killed.
        Unreadable: while iterating, with the name of the broken file.
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


def load_batches(dataset, order, workers: int):
    """For each list in ``order`` what dataset.__getitems__ makes of it; an exception that it returns is raised here.

    Raises:
        DataError: a worker was killed.
    """
    # with a generator of its own DataLoader leaves the global one alone
    private, pin = torch.Generator(), torch.cuda.is_available()
    settings = {"num_workers": workers, "pin_memory": pin, "generator": private}
    settings["worker_init_fn"] = _leave_signals_to_main
    try:
        with torch.device("cpu"):  # DataLoader draws where the user's default device is, with our generator
            loader = DataLoader(dataset, batch_sampler=order, collate_fn=_identity, **settings)
            batches = iter(loader)
        for made in batches:
            if isinstance(made, Exception):
                raise made
            yield made
    except RuntimeError as error:
        if not re.match(r"DataLoader worker \(pid", str(error)):
            raise
        raise DataError(f"one of {workers} workers was killed: memory or /dev/shm may be short") from error


def _shares(order, first, share, batch):
    """(position, index) of each sample of this rank, batch by batch, without end."""
    while True:
        yield [(position, order.index(position)) for position in range(first, first + share)]
        first += batch


class _Order:
    """Which item stands where: a permutation for each epoch, of which the last one used is kept."""

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
    """Samples of given positions and indices, as a `Batch`, or the exception that the user has to see."""

    def __init__(self, source, seed, skip):
        self.source, self.seed, self.skip = source, seed, skip

    def __getitems__(self, pairs):
        skipped = []
        try:
            items = [self._read(position, index, skipped) for position, index in pairs]
        except (Unreadable, DataError) as error:
            return error  # raised in a worker, it would reach the user with the worker's traceback for a text
        x, y, indices = zip(*items, strict=True)
        y, indices = (torch.tensor(each, device="cpu") for each in (y, indices))
        return Batch(torch.stack(x), y, indices, skipped)

    def _read(self, position, index, skipped):
        """x, y and the index of what is read for a position, from ``index`` on."""
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
        raise DataError(f"nothing is readable: {len(tried)} items in a row failed, the first of them {tried[0]}")


def _leave_signals_to_main(worker):
    """Leave it to the main process what a signal means that all of its group gets, as from torchrun or Ctrl-C."""
    for number in ENDING:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # on Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """End when the main process asks for it: it would wait forever, at its own end, for a worker that does not."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


def _identity(made):
    return made
