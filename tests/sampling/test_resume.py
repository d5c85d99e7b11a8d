"""A run resumes where it stopped, redoes nothing, and overwrites nothing unless asked to."""

import errno

import numpy as np
import pytest
from PIL import Image

from ditfast.sampling.files import SampleFolder


@pytest.fixture
def written(monkeypatch):
    """The numbers of the written images."""
    numbers, write = [], SampleFolder.write

    def note(self, index, *args):
        write(self, index, *args)
        numbers.append(index)

    monkeypatch.setattr(SampleFolder, "write", note)
    return numbers


def interrupt_after(monkeypatch, count, error):
    """Raise in the middle of writing image number ``count``; return a function that repairs the disk."""
    save, saved = Image.Image.save, []

    def fail(self, path, **options):
        if len(saved) == count:
            path.write_bytes(b"half an ima")
            raise error
        save(self, path, **options)
        saved.append(path)

    monkeypatch.setattr(Image.Image, "save", fail)
    return lambda: monkeypatch.setattr(Image.Image, "save", save)


def test_an_interrupted_run_resumes(run, refusal, written, monkeypatch, tmp_path):
    options = ("--num-samples", 6, "--batch", 2)
    whole = run(*options, out="whole")
    written.clear()
    repair = interrupt_after(monkeypatch, 3, KeyboardInterrupt())
    assert "interrupted: finished images are kept" in refusal(*options)
    repair()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("000000.png", "000001.png", "000002.png", "settings.json")
    ]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    np.testing.assert_allclose(run(*options).astype(int), whole.astype(int), atol=1)
    assert written == [0, 1, 2, 3, 4, 5]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_full_disk_is_one_line_and_keeps_finished_shards(run, refusal, monkeypatch, written, tmp_path):
    repair = interrupt_after(monkeypatch, 2, OSError(errno.ENOSPC, "No space left on device"))
    message = refusal("--num-samples", 4)
    assert "000002.png: No space left on device; finished images are kept" in message
    assert sorted(p.name for p in (tmp_path / "out").glob("*")) == ["000000.png", "000001.png", "settings.json"]
    repair()
    assert len(run("--num-samples", 4)) == 4 and written == [0, 1, 2, 3]


def test_a_full_disk_leaves_no_half_npz(run, refusal, monkeypatch, tmp_path):
    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("numpy.lib.format.write_array_header_1_0", fail)
        assert "s.npz: No space left on device" in refusal("--num-samples", 2, "--npz", tmp_path / "s.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    run("--num-samples", 2, "--npz", tmp_path / "s.npz")
    assert (tmp_path / "s.npz").exists()


def test_a_larger_number_adds_samples(run, written):
    few = run("--num-samples", 2)
    more = run("--num-samples", 5, "--batch", 3)
    np.testing.assert_array_equal(more[:2], few)
    assert written == [0, 1, 2, 3, 4]


def test_other_settings_are_rejected_unless_overwriting(run, refusal, written, tmp_path):
    first = run("--num-samples", 3)
    message = refusal("--num-samples", 3, "--cfg", 2)
    assert "another run (guidance was" in message and "--overwrite" in message
    assert "steps was 4, is 5" in refusal("--num-samples", 3, steps=5)
    assert "seeds was" in refusal("--num-samples", 3, "--seed", 1)
    assert "classes was null, is [1, 2]" in refusal("--classes", 1, 2)
    np.testing.assert_array_equal(run("--num-samples", 3), first)
    (tmp_path / "out/notes.txt").write_text("mine")
    second = run("--num-samples", 2, "--cfg", 2, "--overwrite")
    assert len(second) == 2 and (tmp_path / "out/notes.txt").read_text() == "mine"
    assert (second != first[:2]).any()
    assert written == [0, 1, 2, 0, 1]


def test_overwriting_with_the_same_settings_redoes_no_image(run, refusal, written, tmp_path):
    files = ("--grid", tmp_path / "g.png", "--npz", tmp_path / "s.npz")
    run("--num-samples", 2, *files)
    for option, path in (("--grid", tmp_path / "g.png"), ("--npz", tmp_path / "s.npz")):
        path.write_bytes(b"mine")
        assert f"{option} {path} exists" in refusal("--num-samples", 2, option, path)
        assert path.read_bytes() == b"mine"
    run("--num-samples", 2, *files, "--overwrite")
    assert Image.open(tmp_path / "g.png").size == (18, 8)
    assert written == [0, 1]


def test_a_finished_command_can_be_repeated(run, refusal, written, tmp_path):
    options = ("--num-samples", 2, "--grid", tmp_path / "g.png", "--npz", tmp_path / "s.npz")
    run(*options)
    before = [path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    run(*options)
    assert [path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()] == before
    assert written == [0, 1]
    assert "s.npz exists" in refusal("--num-samples", 3, *options[4:])


@pytest.mark.parametrize("broken", ("cut", "empty", "text", "grey", "small"))
def test_a_broken_image_is_made_again(run, written, tmp_path, broken):
    before = run("--num-samples", 3)
    path = tmp_path / "out/000001.png"
    whole, picture = path.read_bytes(), Image.open(path)
    if broken in ("grey", "small"):
        (picture.convert("L") if broken == "grey" else picture.resize((4, 4))).save(path)
    else:
        path.write_bytes({"cut": whole[:-20], "empty": b"", "text": b"mine"}[broken])
    np.testing.assert_allclose(run("--num-samples", 3), before, atol=1)  # a batch of another size rounds differently
    assert written == [0, 1, 2, 1]


def test_other_weights_are_another_run(run, refusal, save, tmp_path):
    run("--num-samples", 1)
    assert "weights was" in refusal("--num-samples", 1, model=save(tmp_path / "other", depth=1))


def test_an_unrelated_folder_is_left_alone(refusal, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/000000.png").write_bytes(b"mine")
    for options in ((), ("--overwrite",)):
        assert "holds other files" in refusal("--num-samples", 1, *options)
    assert [p.read_bytes() for p in (tmp_path / "out").iterdir()] == [b"mine"]


def test_a_broken_settings_file_is_another_run(run, refusal, tmp_path):
    run("--num-samples", 1)
    (tmp_path / "out/settings.json").write_text("[1")
    assert "settings.json cannot be read" in refusal("--num-samples", 1)
    assert len(run("--num-samples", 1, "--overwrite")) == 1
