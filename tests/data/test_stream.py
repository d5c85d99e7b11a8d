"""The sequence of samples depends only on the seed."""

import os
import signal
import time
from multiprocessing import active_children

import numpy as np
import pytest
import torch

from ditfast.data import DataError, Unreadable
from ditfast.data.digits import Digits
from ditfast.data.stream import stream_batches
from ditfast.seeds import derive_seed

SEEN = 30  # positions: more than four epochs


class Numbers:
    """Items that return their index and a draw of their generator; those in ``broken`` cannot be read."""

    shape, num_classes, identity = (1, 1, 2), 5, {}

    def __init__(self, count=7, broken=(), slow=()):
        self.count, self.broken, self.slow = count, broken, slow

    def read(self, index, generator):
        time.sleep(0.05 * (index in self.slow))
        drawn = float(torch.rand((), generator=generator))
        if index in self.broken:
            raise Unreadable(f"item {index} is broken")
        return torch.tensor([[[float(index), drawn]]]), index % 5


def sequence(source, start=0, end=SEEN, world=1, batch=6, seed=3, **settings):
    """(index, label, draw) at each position from ``start`` to ``end``, gathered from all ranks."""
    ranks = [
        stream_batches(source, seed=seed, start=start, batch=batch, rank=r, world=world, **settings)
        for r in range(world)
    ]
    seen = []
    while len(seen) < end - start:
        for rank in ranks:
            x, y, indices, _ = next(rank)
            assert x.shape == (batch // world, *source.shape) and x.dtype == torch.float32
            assert y.dtype == indices.dtype == torch.int64 and y.shape == indices.shape == (batch // world,)
            assert x[:, 0, 0, 0].tolist() == indices.tolist()
            seen += zip(indices.tolist(), y.tolist(), x[:, 0, 0, 1].tolist(), strict=True)
    return seen[: end - start]


def test_every_epoch_has_every_item_once_in_a_new_order():
    seen = [index for index, _, _ in sequence(Numbers(), end=28, batch=1)]
    epochs = [tuple(seen[start : start + 7]) for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) == 4


def test_draws_are_new_at_every_position():
    assert len({drawn for _, _, drawn in sequence(Numbers())}) == SEEN


def test_every_seed_gives_its_own_order_and_draws():
    one, other = sequence(Numbers(), seed=3), sequence(Numbers(), seed=4)
    assert [each[0] for each in one] != [each[0] for each in other]
    assert not {each[2] for each in one} & {each[2] for each in other}


@pytest.mark.parametrize("count", [7, None])
@pytest.mark.parametrize("batch", [1, 5, 6, 16])
def test_the_batch_does_not_matter(batch, count):
    assert sequence(Numbers(count), batch=batch) == sequence(Numbers(count))


@pytest.mark.parametrize("count", [7, None])
@pytest.mark.parametrize("world", [2, 3, 6])
def test_the_number_of_ranks_does_not_matter(world, count):
    assert sequence(Numbers(count), world=world) == sequence(Numbers(count))


@pytest.mark.parametrize("start", [1, 6, 7, 13, 14, 20])
def test_the_start_does_not_matter(start):
    assert sequence(Numbers(), start, SEEN + start)[: SEEN - start] == sequence(Numbers())[start:]
    assert sequence(Numbers(), start, SEEN, world=3, batch=3) == sequence(Numbers())[start:]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_number_of_workers_does_not_matter(workers):
    source = Numbers(slow=(1, 4))  # so that workers overtake each other
    torch.manual_seed(workers)
    assert sequence(source, 5, workers=workers) == sequence(Numbers())[5:]
    assert sequence(source, 5, world=2, workers=workers) == sequence(Numbers())[5:]


def test_an_endless_source_is_read_by_number():
    assert [index for index, _, _ in sequence(Numbers(None), 4, 20)] == list(range(4, 20))


def test_the_global_generator_is_left_alone():
    before = torch.random.get_rng_state()
    for workers in (0, 1):
        sequence(Numbers(), workers=workers)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_readable_item_replaces_a_broken_one(workers):
    whole = sequence(Numbers())
    replaced = {2: 3, 5: 0, 6: 0}
    source = Numbers(broken=(2, 5, 6))
    seen = sequence(source, unreadable="skip", workers=workers)
    assert [each[0] for each in seen] == [replaced.get(index, index) for index, _, _ in whole]
    assert [each[2] for each in seen] == [drawn for _, _, drawn in whole]  # draws belong to the position
    assert sequence(source, unreadable="skip", world=2) == seen
    batch = next(stream_batches(source, seed=3, start=0, batch=7, workers=workers, unreadable="skip"))
    assert sorted(batch.skipped) == sorted(f"item {i} is broken" for i in (2, 5, 6, 6))
    assert next(stream_batches(Numbers(), seed=3, start=0, batch=7, unreadable="skip")).skipped == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_item_is_named_when_its_turn_comes(workers):
    broken = sequence(Numbers())[4][0]
    batches = stream_batches(Numbers(broken=(broken,)), seed=3, start=0, batch=2, workers=workers)
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(Unreadable) as raised:
        next(batches)
    assert str(raised.value) == f"item {broken} is broken"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("count", [7, None])
def test_skipping_everything_terminates(count, workers):
    batches = stream_batches(
        Numbers(count, broken=range(2000)), seed=3, start=5, batch=2, workers=workers, unreadable="skip"
    )
    tried = {7: 7, None: 1000}[count]
    with pytest.raises(
        DataError, match=rf"nothing is readable: {tried} items in a row failed, .* item \d is broken$"
    ):
        next(batches)


def test_an_error_of_the_source_itself_keeps_its_traceback():
    class Wrong(Numbers):
        def read(self, index, generator):
            raise RuntimeError("the source is wrong")

    with pytest.raises(RuntimeError, match=r"(?s)in read.*the source is wrong"):
        next(stream_batches(Wrong(), seed=0, start=0, batch=1, workers=1))


def test_a_killed_worker_is_one_line():
    class Killed(Numbers):
        def read(self, index, generator):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DataError, match="one worker of 1 was killed"):
        next(stream_batches(Killed(), seed=0, start=0, batch=1, workers=1))


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs Linux")
def test_a_worker_ends_only_with_its_parent():
    """Otherwise a signal to the group would end it before the last checkpoint, or the parent would never end."""

    class Told(Numbers):
        def read(self, index, generator):
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
            time.sleep(0.02)
            return super().read(index, generator)

    before = active_children()
    batches = stream_batches(Told(), seed=0, start=0, batch=3, workers=1)
    assert [len(next(batches).y) for _ in range(4)] == [3, 3, 3, 3]
    (worker,) = set(active_children()) - set(before)
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 7, "world": 2}, "batch must be a positive multiple of world, got batch 7 and world 2"),
        ({"batch": 0}, "got batch 0 and world 1"),
        ({"rank": 2, "world": 2}, r"rank must be in \[0, 1\], got 2"),
        ({"start": -1}, "start must not be negative, got -1"),
        ({"workers": -1}, "workers must not be negative, got -1"),
        ({"unreadable": "ignore"}, "unreadable must be 'skip' or 'fail', got 'ignore'"),
    ],
)
def test_bad_arguments_are_rejected_at_once(changes, message):
    with pytest.raises(DataError, match=message):
        stream_batches(Numbers(), **{"seed": 0, "start": 0, "batch": 6, **changes})


def test_an_empty_source_is_rejected():
    with pytest.raises(DataError, match="the data is empty"):
        stream_batches(Numbers(0), seed=0, start=0, batch=1)


def test_digits_stream():
    source = Digits()
    x, y, indices, _ = next(stream_batches(source, seed=0, start=1795, batch=5))  # across the end of an epoch
    for i, index in enumerate(indices.tolist()):
        expected, label = source.read(index, None)
        assert torch.equal(x[i], expected) and y[i] == label


def test_the_hash_spreads_adjacent_numbers_over_all_bits():
    near = np.array([derive_seed(seed, 1, position) for seed in range(64) for position in range(64)], np.uint64)
    assert len(np.unique(near.astype(np.uint32))) > len(near) - 3
    bits = near[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    assert abs(bits.mean(0) - 0.5).max() < 0.04  # 5 standard deviations
    assert derive_seed(1, 2) != derive_seed(2, 1) and 0 <= derive_seed(-5, 3) < 2**64
