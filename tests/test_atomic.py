"""Files are complete or absent."""

import pytest

from ditfast.atomic import atomic_write


@pytest.mark.parametrize("concurrent", [False, True])
def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path, concurrent):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path, concurrent) as part:
        part.write_text("new")
        assert path.read_text() == "old" and part.parent == tmp_path
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_unfinished_file_is_removed(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path) as part:
        part.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_parent_that_is_not_a_folder_raises_the_systems_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), atomic_write(tmp_path / "file" / "inside") as part:
        part.write_text("new")


def test_processes_that_write_the_same_file_use_separate_temporary_files(tmp_path, monkeypatch):
    with atomic_write(tmp_path / "file", concurrent=True) as part:
        monkeypatch.setattr("os.getpid", lambda: 0)
        with atomic_write(tmp_path / "file", concurrent=True) as other:
            assert part != other
            part.touch()
            other.touch()
