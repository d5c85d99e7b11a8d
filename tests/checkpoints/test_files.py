"""find_model: what it reads, and that it executes nothing."""

import argparse
import os
import pickle
import zipfile

import pytest
import torch

from ditfast import find_model
from ditfast.checkpoints import files


class Evil:
    """Runs a command when unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.fixture
def training(kit, tmp_path):
    """A checkpoint in the format of the original's training."""
    model, ema = kit.tiny(seed=1), kit.tiny(seed=2)
    opt = torch.optim.AdamW(model.parameters())
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, vae="ema", cfg=None, lr=1e-4)
    path = tmp_path / "0050000.pt"
    content = {"model": model.state_dict(), "ema": ema.state_dict(), "opt": opt.state_dict(), "args": args}
    torch.save(content, path)
    return path, content


def equal(got, expected):
    return list(got) == list(expected) and all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("zipped", [True, False])
def test_bare_state_dict(kit, tmp_path, zipped):
    state = kit.tiny().state_dict()
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    assert equal(find_model(tmp_path / "x.pt"), state)


def test_training_checkpoint_yields_the_average(training):
    path, content = training
    assert equal(find_model(str(path)), content["ema"])
    torch.save({"model": content["model"], "args": content["args"]}, path)
    assert equal(find_model(path), content["model"])


def test_namespace_is_allowed_for_this_call_only(training):
    path, _ = training
    find_model(path)
    with pytest.raises(pickle.UnpicklingError, match="argparse.Namespace"):
        torch.load(path, weights_only=True)


def test_weights_outlive_the_file(training):
    path, content = training
    state = find_model(path)
    path.write_bytes(b"0" * path.stat().st_size)
    assert equal(state, content["ema"])


@pytest.mark.parametrize("where", ["value", "inside args", "bare pickle", "old format"])
def test_malicious_file_is_rejected_and_executes_nothing(kit, tmp_path, where):
    path, mark = tmp_path / "x.pt", tmp_path / "executed"
    evil = Evil(f"touch {mark}")
    content = kit.tiny().state_dict() | {"evil": evil}
    if where == "inside args":
        content = {"ema": kit.tiny().state_dict(), "args": argparse.Namespace(evil=evil)}
    if where == "bare pickle":
        path.write_bytes(pickle.dumps(evil, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=where != "old format")
    with pytest.raises(ValueError, match=r"x.pt is refused: reading it would run \w+.system; nothing was executed"):
        find_model(path)
    assert not mark.exists()
    if where == "bare pickle":  # the file is really malicious
        pickle.loads(path.read_bytes())
        assert mark.exists()


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 0.3, 0.9, -1])
def test_truncated(kit, tmp_path, suffix, kept):
    save = torch.save if suffix == "pt" else __import__("safetensors.torch").torch.save_file
    path = tmp_path / f"x.{suffix}"
    save(kit.tiny().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match=f"x.{suffix} is truncated or not"):
        find_model(path)


def test_text_is_not_a_checkpoint(tmp_path):
    (tmp_path / "x.pt").write_text("not found")
    with pytest.raises(ValueError, match="x.pt is truncated or not a checkpoint"):
        find_model(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [[1, 2], {}, {"ema": {}}, {"a": 1}, {"model": {"a": torch.ones(1), "b": 2}}])
def test_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="x.pt has no weights"):
        find_model(tmp_path / "x.pt")


def test_released_names_are_downloaded_safely(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda url, **options: calls.append((url, options)))
    monkeypatch.setattr(files, "why_no_answer", lambda url: None)
    find_model("DiT-XL-2-256x256.pt")
    find_model("DiT-XL-2-512x512.pt")
    assert [url for url, _ in calls] == [f"https://dl.fbaipublicfiles.com/DiT/models/{n}" for n in files.RELEASED]
    assert all(options == {"map_location": "cpu", "weights_only": True} for _, options in calls)


def test_released_name_that_is_a_file_here_is_read(kit, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save(kit.tiny().state_dict(), "DiT-XL-2-256x256.pt")
    assert equal(find_model("DiT-XL-2-256x256.pt"), kit.tiny().state_dict())


def test_missing_file():
    with pytest.raises(FileNotFoundError, match="no file 'gone.pt'; downloadable names: DiT-XL-2-256x256.pt"):
        find_model("gone.pt")


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a Git LFS pointer"),
        ("\n<!DOCTYPE html><title>404</title>", "is a web page"),
    ],
)
def test_failed_downloads_in_place_of_weights(tmp_path, suffix, text, said):
    (tmp_path / f"x.{suffix}").write_text(text)
    with pytest.raises(ValueError, match=f"x.{suffix} {said}"):
        find_model(tmp_path / f"x.{suffix}")


def test_a_tensor_larger_than_its_file(tmp_path):
    torch.save({"a": torch.zeros(3), "b": torch.zeros(1).expand(10**9)}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match=r"claims more numbers than its \d+ bytes can hold, the most in b \(1000000000,\)"
    ):
        find_model(tmp_path / "x.pt")


def test_a_compressed_member(kit, tmp_path):
    torch.save(kit.tiny().state_dict(), tmp_path / "x.pt")
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="packed.pt is compressed, which torch.save's files are not: "):
        find_model(packed)
