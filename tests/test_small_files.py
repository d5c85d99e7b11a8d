"""Small files with invalid contents."""

import os

import pytest

from ditfast import small_files
from ditfast.paths import why_unusable
from ditfast.small_files import read_object


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff", "is not valid JSON"),
        (b"[]", "must hold a JSON object, got list"),
        (b"9" * 5000, "is not valid JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"a":' * 100_000, "nested too deep"),
    ],
)
def test_invalid_json_objects(tmp_path, content, reason):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"config.json {reason}|config.json must .* {reason}"):
        read_object(path)
    path.write_text('{"a": 1}')
    assert read_object(path) == {"a": 1}


def test_files_that_may_never_end(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe", tmp_path):
        with pytest.raises(OSError, match="is not a regular file"):
            read_object(path)
    monkeypatch.setattr(small_files, "LARGEST", 3)
    (tmp_path / "large").write_text("1234")
    with pytest.raises(OSError, match="large has 4 bytes, more than 3"):
        read_object(tmp_path / "large")


def test_impossible_paths(tmp_path):
    assert why_unusable("x" * 300) == f"cannot be {'x' * 57}...: File name too long"
    assert why_unusable("") == "must be a path, got ''"
    assert why_unusable("a\0b").startswith("cannot be a")
    for path in (tmp_path, tmp_path / "new", tmp_path / "no" / "new", "/dev/null/new", "owner/name"):
        assert why_unusable(path) is None
