"""Damage in a run's folder is noticed, and an intact alternative is used."""

import json
import os
import random
import shutil

import pytest

from ditfast.training import manifest
from ditfast.training.manifest import ABOUT, find_fault, read_about, write_about


@pytest.fixture
def out(trained, kit):
    return shutil.copytree(trained, kit.folder / "run")


@pytest.fixture
def newest(out):
    return out / "checkpoints" / "step-00000004"


def test_every_flipped_bit_of_checkpoint_json_is_noticed(newest):
    """Or it changes nothing, e.g. 1e-5 to 1E-5."""
    path, about = newest / ABOUT, read_about(newest)
    content, chance = path.read_bytes(), random.Random(0)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        assert find_fault(newest) or read_about(newest) == about, damaged[place - 20 : place + 20]
    for end in range(len(content)):
        path.write_bytes(content[:end])
        assert find_fault(newest)


FILE = [10, "00000000"]
WRONG = {
    "no files": {"files": {}},
    "no data": {"files": {".metadata": FILE}},
    "a list": {"files": [1]},
    "a device": {"files": {".metadata": FILE, "__0_0.distcp": FILE, "/dev/zero": FILE}},
    "a file above": {"files": {".metadata": FILE, "__0_0.distcp": FILE, "../x": FILE}},
    "sums of another type": {"files": {".metadata": FILE, "__0_0.distcp": "1"}},
    "no step": {"step": None},
    "a step that is text": {"step": "4"},
    "a model that is none": {"model": []},
    "samples that are true": {"samples": True},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_invalid_content_is_damage(newest, wrong):
    write_about(newest, {**read_about(newest), **WRONG[wrong]})
    assert find_fault(newest).startswith("checkpoint.json is damaged: ")


def test_another_steps_content_is_damage(newest):
    write_about(newest, {**read_about(newest), "step": 2})
    assert find_fault(newest) == "checkpoint.json belongs to step 2"


@pytest.mark.parametrize("file", [ABOUT, ".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("other", ["/dev/zero", "pipe", "folder"])
def test_only_regular_files_are_read(newest, file, other):
    (newest / file).unlink()
    if other == "pipe":
        os.mkfifo(newest / file)
    elif other == "folder":
        (newest / file).mkdir()
    else:
        (newest / file).symlink_to(other)
    assert file in find_fault(newest)


@pytest.mark.parametrize("content", ["[" * 100_000, "7", "null", '{"a": 1}'])
def test_json_of_another_kind_is_damage(newest, content, monkeypatch):
    (newest / ABOUT).write_text(content)
    assert find_fault(newest).startswith("checkpoint.json is damaged: ")
    monkeypatch.setattr(manifest, "LARGEST", 3)
    assert "checkpoint.json is damaged" in find_fault(newest)


def test_files_without_their_own_checksum_are_from_older_versions(newest):
    about = read_about(newest)
    del about["cpu"]  # nor did they have this
    (newest / ABOUT).write_text(json.dumps(about))
    assert read_about(newest) == about
    (newest / ABOUT).write_text(json.dumps({**about, "checksun": "1"}))
    assert "checksum mismatch" in find_fault(newest)


def test_the_previous_checkpoint_is_used_and_the_damaged_one_named(kit, out, newest):
    content = (newest / ABOUT).read_text()
    (newest / ABOUT).write_text(content.replace('"samples": 24', '"samples": 25'))
    with pytest.warns(UserWarning, match="skipping .*step-00000004: checkpoint.json is damaged: checksum mismatch"):
        kit.train("run", "--resume", "auto")
    assert kit.losses(out) == kit.losses(kit.train("whole"))


def test_an_intact_checkpoint_from_another_run_is_not_damage(out, refused):
    assert "is from another run: seed was 0, is 1" in refused("--resume", "auto", "--seed", 1, name="run")


@pytest.mark.parametrize("damage", [b"\xff", b"\x00", b"["])
def test_a_damaged_log_line_is_dropped(kit, out, damage):
    path, expected = out / "metrics.jsonl", kit.lines(out)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:5] + damage + lines[1][6:]
    path.write_bytes(b"".join([*lines, b'{"step": "5"}\n', b'{"step": NaN}\n', b"[" * 100_000 + b"\n", b"7\n"]))
    kit.train("run", "--resume", "auto", "--steps", 5)
    assert [line["step"] for line in kit.lines(out)] == [1, 3, 4, 5]
    assert kit.lines(out)[0] == expected[0]
