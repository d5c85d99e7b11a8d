"""Between two lines of the log no step waits for the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ditfast import train
from ditfast.training import loop

READS = {"aten._local_scalar_dense.default", "aten.equal.default", "aten.nonzero.default", "aten.item.default"}


class Waits(TorchDispatchMode):
    """Counts the calls that would make a GPU's host wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in READS:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch):
    """What each step read from the device."""
    step, seen = loop.Run._step, []

    def watch(run, batch):
        with Waits() as waits:
            found = step(run, batch)
        seen.append(waits.seen)
        return found

    monkeypatch.setattr(loop.Run, "_step", watch)
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_no_step_reads_from_the_device(kit, watched, precision):
    kit.train("run", "--precision", precision, "--clip", 1, "--accumulate", 2, "--steps", 3)
    assert watched == [[], [], []]


def test_reading_would_be_seen():
    with Waits() as waits:
        torch.ones(()).item()
        bool(torch.ones(2).equal(torch.ones(2)))
    assert len(waits.seen) >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_twenty_steps_never_wait_for_the_gpu(kit, monkeypatch, precision):
    step = loop.Run._step

    def strict(run, batch):
        torch.cuda.set_sync_debug_mode("error" if run.step >= 3 else "default")
        try:
            return step(run, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Run, "_step", strict)
    kit.train("run", "--precision", precision, "--steps", 23, "--log-every", 23, "--save-every", 23)


def test_the_log_reads_once(kit, monkeypatch):
    """One line for many steps is one copy from the device, not one for each."""
    read, reads = loop.Meter.read, []

    def watch(meter):
        with Waits() as waits:
            found = read(meter)
        reads.append(len(waits.seen))
        return found

    monkeypatch.setattr(loop.Meter, "read", watch)
    kit.train("run", "--steps", 6, "--log-every", 6, "--save-every", 6)
    assert reads == [0]  # tolist is a single copy
    assert train.parse([])[0].log_every == 100
