"""Between two log lines, no step waits for the device."""

from contextlib import contextmanager

import pytest
import torch

from ditfast.training import loop

WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__")


@contextmanager
def waits(monkeypatch):
    """Record calls that would make the host wait for a GPU, by name."""
    seen = []
    with monkeypatch.context() as patch:
        for name in WAITS:
            original = getattr(torch.Tensor, name)

            def call(*args, original=original, name=name, **kwargs):
                seen.append(name)
                return original(*args, **kwargs)

            patch.setattr(torch.Tensor, name, call)
        yield seen


@pytest.fixture
def watched(monkeypatch):
    """Record what each step reads from the device."""
    step, seen = loop.Run._step, []

    def watch(run, batch):
        with waits(monkeypatch) as calls:
            found = step(run, batch)
        seen.append(calls)
        return found

    monkeypatch.setattr(loop.Run, "_step", watch)
    return seen


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_no_step_reads_from_the_device(kit, watched, precision):
    kit.train("run", "--precision", precision, "--clip", 1, "--accumulate", 2, "--steps", 3)
    assert watched == [[], [], []]


def test_waiting_would_be_detected(monkeypatch):
    with waits(monkeypatch) as calls:
        torch.ones(()).item()
        bool(torch.ones(2).sum() > 1)
        torch.ones(2).tolist()
    assert calls == ["item", "__bool__", "tolist"]


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
    options = ("--steps", 23, "--log-every", 23, "--save-every", 23, "--clip", 1, "--accumulate", 2)
    kit.train("run", "--precision", precision, *options)


def test_the_log_reads_once(kit, monkeypatch):
    """A log line, of step 1 or of many steps, takes one copy from the device, not one per step."""
    read, reads = loop.Meter.read, []

    def watch(meter):
        with waits(monkeypatch) as calls:
            found = read(meter)
        reads.append(calls)
        return found

    monkeypatch.setattr(loop.Meter, "read", watch)
    kit.train("run", "--steps", 6, "--log-every", 6, "--save-every", 6)
    assert reads == [["tolist"], ["tolist"]]  # steps 1 and 6
