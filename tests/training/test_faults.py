"""Faults during a run lose nothing that was saved, and are reported."""

import errno
import itertools
import json
import os

import pytest
import torch

from ditfast.data.digits import Digits
from ditfast.data.stream import stream_batches
from ditfast.training import checkpoint, loop


@pytest.fixture
def out(kit):
    return kit.train("run", "--steps", 4, "--keep", 10)


def newest(out):
    return sorted((out / "checkpoints").glob("step-*"))[-1]


@pytest.mark.parametrize("moment", ["data", "rename"])
def test_killed_while_writing_a_checkpoint(kit, moment):
    where = {"data": "checkpoint, '_write'", "rename": "checkpoint.os, 'replace'"}[moment]
    die = f"""
import os, sys
from ditfast.training import checkpoint
work, name = {where}
original, calls = getattr(work, name), []
def dying(*given):
    if "step-" in str(given[-1]):
        calls.append(given)
    if len(calls) == 2:
        os._exit(9)
    return original(*given)
setattr(work, name, dying)
"""
    code, text = kit.finish(kit.start("killed", before=die))[0]
    folder = kit.folder / "killed" / "checkpoints"
    assert code == 9 and [path.name for path in folder.glob("step-*")] == ["step-00000002"], text
    assert (folder / ".step-00000004.part").is_dir()
    kit.train("killed", "--resume", "auto")
    assert kit.losses(kit.folder / "killed") == kit.losses(kit.train("whole"))
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{step}" for step in (2, 4, 6)]


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.unlink])
@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(kit, out, damage, file):
    damage(newest(out) / file)
    with pytest.warns(UserWarning, match=f"skipping .*step-00000004: {file}"):
        kit.train("run", "--resume", "auto", "--steps", 4)
    assert [line["step"] for line in kit.lines(out)] == [1, 2, 3, 4]


def test_no_intact_checkpoint(kit, out, refused):
    for path in (out / "checkpoints").iterdir():
        (path / "checkpoint.json").write_text("{")
    with pytest.warns(UserWarning, match="checkpoint.json is damaged"):
        assert "none of 2 checkpoints" in refused("--resume", "auto", name="run")


def test_a_full_disk_keeps_existing_checkpoints_and_training_continues(kit, monkeypatch, capsys):
    write, calls = checkpoint._write, []

    def full(tensors, part):
        calls.append(part)
        write(tensors, part)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write", full)
    out = kit.train("run", "--steps", 6)
    assert "step-00000004: No space left on device; training continues" in capsys.readouterr().err
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000006"]
    assert kit.losses(out) == kit.losses(kit.train("whole"))


def test_a_full_disk_at_the_end_is_an_error(monkeypatch, refused):
    def full(tensors, part):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write", full)
    assert refused("--steps", 1).endswith("step-00000001: No space left on device")


def test_only_the_newest_are_kept(kit):
    out = kit.train("run", "--keep", 2)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]


@pytest.fixture
def poisoned(monkeypatch):
    """Make the losses of the third and the fifth step NaN."""
    losses = loop.Run._losses

    def poison(run, *given):
        return [each * (float("nan") if run.step in (2, 4) else 1) for each in losses(run, *given)]

    monkeypatch.setattr(loop.Run, "_losses", poison)


def test_a_non_finite_loss_stops(kit, poisoned, refused):
    text = refused("--batch", 6, name="run")
    good = kit.folder / "run" / "checkpoints" / "step-00000002"
    assert text.startswith("error: the gradient of step 3 is not finite") and str(good) in text
    about = json.loads((kit.folder / "run" / "nonfinite.jsonl").read_text())
    assert about["step"] == 3 and about["checkpoint"] == str(good)
    third = next(itertools.islice(stream_batches(Digits(), seed=0, start=0, batch=6), 2, None))
    assert about["samples"] == third.indices.tolist()


def test_a_non_finite_loss_is_skipped_and_counted(kit, poisoned):
    out = kit.train("run", "--on-nonfinite", "skip")
    lines = kit.lines(out)
    assert [line["nonfinite"] for line in lines] == [0, 0, 1, 1, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, True, False]
    state = read(newest(out), out)
    assert all(value.isfinite().all() for value in state.values())
    assert {value.item() for name, value in state.items() if name.startswith("step.")} == {4.0}


def read(path, out):
    """A checkpoint's tensors by name, read with PyTorch's own tool."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp_to_torch_save(path, out / "merged.pt")
    return torch.load(out / "merged.pt", weights_only=True)


def test_a_skipped_step_changes_no_weight(kit, poisoned):
    out = kit.train("run", "--on-nonfinite", "skip", "--steps", 3, "--keep", 5)
    # after the second step, and after the third, which is skipped
    states = [read(path, out) for path in sorted((out / "checkpoints").iterdir())]
    names = [name for name in states[0] if not name.startswith("ema.")]
    assert len(states) == 2 and all(torch.equal(states[0][name], states[1][name]) for name in names)


@pytest.fixture
def images(tmp_path):
    """Two classes of five images, one of them broken."""
    image = pytest.importorskip("PIL.Image")
    for label in "ab":
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(5):
            image.new("RGB", (20, 14), (40 * i, 9, 200)).save(tmp_path / "images" / label / f"{i}.png")
    truncate(tmp_path / "images" / "b" / "3.png")
    return tmp_path / "images"


def test_an_image_that_cannot_be_read_is_named(images, refused):
    text = refused("--data", images, "--image-size", 8, "--model", "DiT-S/2", "--steps", 3)
    assert str(images / "b" / "3.png") in text


def test_an_image_that_cannot_be_read_is_skipped_and_counted(kit, images):
    options = ("--data", images, "--image-size", 8, "--unreadable", "skip")
    out = kit.train("run", *options, "--steps", 5)  # 30 samples: three epochs
    assert kit.lines(out)[-1]["unreadable"] == 3


def test_a_grid_that_cannot_be_written_is_a_warning(kit, monkeypatch):
    image = pytest.importorskip("PIL.Image")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(image.Image, "save", full)
    with pytest.warns(UserWarning, match="cannot write .*step-00000002.png: No space left on device"):
        out = kit.train("run", "--steps", 2, "--sample-every", 2, "--sample-steps", 2)
    assert list((out / "samples").iterdir()) == [] and len(kit.lines(out)) == 2
