"""A stranger's checkpoint: nothing in its files is executed, whoever made the checksums."""

import io
import os
import pickle
import re
import shutil

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from ditfast import export
from ditfast.training.manifest import checksum, find_fault, read_about, write_about
from ditfast.training.tensor_index import read_index


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def out(trained, kit):
    return shutil.copytree(trained, kit.folder / "run")


@pytest.fixture
def newest(out):
    return out / "checkpoints" / "step-00000004"


@pytest.fixture
def trap(tmp_path):
    path = tmp_path / "trap"
    yield path
    assert not path.exists()


def seal(folder):
    """Recompute the checksums of the current files."""
    about = read_about(folder)
    write_about(folder, {**about, "files": {name: checksum(folder / name) for name in about["files"]}})


def write_index(folder, index):
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    seal(folder)


def put_in_place(index, trap):
    return Evil(trap)


def put_inside(index, trap):
    index.planner_data = [Evil(trap)]
    return index


def put_into_a_constructor(index, trap):
    index.state_dict_metadata["model.pos_embed"].size = Evil(trap)
    return index


@pytest.mark.parametrize("put", [put_in_place, put_inside, put_into_a_constructor])
def test_an_index_that_calls_something(kit, out, newest, trap, put):
    write_index(newest, put(read_index(newest), trap))
    reason = re.escape(".metadata is refused: reading it would run posix.mkdir; nothing was executed")
    with pytest.warns(UserWarning, match=f"skipping .*step-00000004: {reason}"):
        kit.train("run", "--resume", "auto")
    assert kit.losses(out)[-1][0] == 6


def test_export_and_a_checkpoint_by_name(newest, refused, tmp_path, trap):
    write_index(newest, Evil(trap))
    assert "would run posix.mkdir" in refused("--resume", newest, name="other")
    with pytest.raises(SystemExit, match="would run posix.mkdir"):
        export.main([str(newest), str(tmp_path / "model")])
    (newest / ".metadata").unlink()
    shutil.copy(newest.parent / "step-00000002" / ".metadata", newest)  # the file is really malicious:
    pickle.loads(pickle.dumps(Evil(trap)))
    trap.rmdir()


def test_an_object_that_is_not_a_tensor(newest, trap):
    """PyTorch unpickles it from the tensors' file, whatever was requested."""
    index = read_index(newest)
    name = "model.x_embedder.proj.weight"
    where = next(info for key, info in index.storage_data.items() if key.fqn == name)
    stream = io.BytesIO()
    torch.save(Evil(trap), stream)
    with open(newest / where.relative_path, "ab") as file:
        where.offset, where.length = file.tell(), len(stream.getvalue())
        file.write(stream.getvalue())
    index.state_dict_metadata[name] = BytesStorageMetadata()
    write_index(newest, index)
    assert "BytesStorageMetadata; nothing was executed" in find_fault(newest)


@pytest.mark.parametrize("path", ["/etc/passwd", "../step-00000002/__0_0.distcp", "", 3])
def test_files_of_other_folders(newest, path):
    index = read_index(newest)
    next(iter(index.storage_data.values())).relative_path = path
    write_index(newest, index)
    assert find_fault(newest) == f".metadata is refused: it names {path!r}"


@pytest.mark.parametrize("content", [b"", b"\x80\x04N.", b"\x80\x04}.", b"\x80\x04", b"(lp0\n.", b"\xff" * 9])
def test_a_broken_index(newest, content):
    (newest / ".metadata").write_bytes(content)
    seal(newest)
    assert find_fault(newest).startswith(".metadata is damaged: ")
