"""No run ends without a checkpoint of its progress, whatever ended it."""

import errno
import os
import signal

import pytest

from ditfast.data import Unreadable
from ditfast.data.digits import Digits
from ditfast.training import loop, preview, weights
from ditfast.training.monitor import append_line

RARELY = ("--save-every", 100)


def failing(error, when):
    """Wrap a function so that it raises when ``when`` says so."""

    def patch(monkeypatch, owner, name):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            if when(*args):
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    return patch


reads = iter(range(1000))
FAULTS = {
    "an image": (Digits, "read", Unreadable("b/3.png cannot be read"), lambda *_: next(reads) == 20),  # of step 4
    "a step": (loop.Run, "_losses", MemoryError("out of memory"), lambda run, *_: run.step == 3),
    "a grid": (
        preview.Preview,
        "write",
        RuntimeError("no grid"),
        lambda _, model, path: "step-00000003" in str(path),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_error_saves_first(kit, monkeypatch, capsys, fault):
    owner, name, error, when = FAULTS[fault]
    grids = (*RARELY, "--sample-every", 3, "--sample-steps", 2)
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=str(error)):
        failing(error, when)(patch, owner, name)
        kit.train("run", *grids)
    assert [path.name for path in (kit.folder / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    kit.train("run", "--resume", "auto", *grids)
    assert kit.losses(kit.folder / "run") == kit.losses(kit.train("whole"))


def test_an_error_inside_an_update_saves_nothing(kit, monkeypatch):
    """The weights are one step ahead of their average."""
    when = lambda averages, *_: averages[0].abs().sum() > 0 and next(updates) == 2  # noqa: E731
    updates = iter(range(100))
    failing(MemoryError("out of memory"), when)(monkeypatch, weights.torch, "_foreach_lerp_")
    with pytest.raises(SystemExit, match="out of memory"):
        kit.train("run", *RARELY)
    assert not (kit.folder / "run" / "checkpoints").exists()


def test_an_error_of_one_rank_saves_on_all(kit):
    unreadable = """
from ditfast.data import Unreadable, digits
read, reads = digits.Digits.read, []
def failing(*given):
    reads.append(given)
    if os.environ["RANK"] == "1" and len(reads) == 10:
        raise Unreadable("b/3.png cannot be read")
    return read(*given)
digits.Digits.read = failing
"""
    results = kit.finish(kit.start("run", *RARELY, world=2, before="import os" + unreadable))
    ends = [text.splitlines()[-1] for _, text in results]
    assert ends == [
        "error: stopped after step 3 of 6, as another rank failed: use --resume auto to continue",
        "error: b/3.png cannot be read",
    ]
    assert [path.name for path in (kit.folder / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_closed_pipes_do_not_end_a_run(kit):
    """For example with ``2>&1 | head -1``: the run continues to the end and succeeds."""
    process = kit.start("run", "--steps", 60, "--save-every", 20)[0]
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=240) == 0
    assert (kit.folder / "run" / "model" / "model.safetensors").exists()


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("method", ["write", "flush", "close"])
def test_a_disk_that_is_full_for_tensorboard_is_a_warning(kit, monkeypatch, method):
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer").RecordWriter
    monkeypatch.setattr(writer, method, full)
    with pytest.warns(UserWarning, match="no longer writing .*tensorboard: No space left on device"):
        out = kit.train("run")
    assert len(kit.lines(out)) == 6 and (out / "model").is_dir()


@pytest.fixture
def heard():
    """Restore the signals that pytest may have inherited as ignored."""

    def unheard(number, frame):
        raise AssertionError(f"nobody handles {number}")

    numbers = (signal.SIGHUP, signal.SIGUSR1, signal.SIGXCPU)
    before = [signal.signal(number, unheard) for number in numbers]
    yield numbers
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_every_signal_that_ends_a_run_saves_first(kit, monkeypatch, heard):
    step = loop.Run._step
    for number in heard:
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=str(128 + number)):
            patch.setattr(loop.Run, "_step", lambda *given, n=number: (signal.raise_signal(n), step(*given))[1])
            kit.train(number.name, *RARELY)


def test_an_ignored_signal_stays_ignored(kit, monkeypatch, heard):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # like nohup
    step = loop.Run._step
    monkeypatch.setattr(loop.Run, "_step", lambda *given: (signal.raise_signal(signal.SIGHUP), step(*given))[1])
    assert len(kit.lines(kit.train("run"))) == 6


def test_a_partial_line_is_removed(tmp_path, monkeypatch):
    """Otherwise the next line would continue it."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.warns(UserWarning, match="cannot write .*metrics.jsonl: No space left on device"):
            append_line(path, {"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    append_line(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
