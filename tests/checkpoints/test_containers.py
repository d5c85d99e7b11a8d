"""Weights in files that trainers save: wrappers' prefixes, other values next to them, the script's arguments."""

import argparse
import collections
import datetime
import pathlib
import pickle
import types

import numpy as np
import pytest
import torch

from ditfast import DiT, find_model

BESIDE = {
    "float64": np.float64(1.5),
    "int64": np.int64(3),
    "bool": np.bool_(True),
    "str": np.str_("a"),
    "array": np.arange(6.0).reshape(2, 3),
    "rng": np.random.RandomState(0).get_state(),
    "path": pathlib.Path("runs/1"),
    "windows": pathlib.PureWindowsPath("c:/runs"),
    "list": collections.defaultdict(list, loss=[1.0, np.float32(2)]),
    "dict": collections.defaultdict(dict),
    "deque": collections.deque([1.0, 2.0], 10),
    "counter": collections.Counter("ab"),
    "namespace": types.SimpleNamespace(lr=np.float64(1e-4), out=pathlib.Path("out")),
    "args": argparse.Namespace(data_path=pathlib.Path("x"), lr=np.float64(1e-4)),
    "when": (datetime.datetime(2024, 1, 2), datetime.timedelta(1)),
    "version": torch.__version__,
    "sets": ({1}, frozenset([1]), range(3)),
}


@pytest.mark.parametrize("name", BESIDE)
def test_values_beside_weights(kit, tmp_path, name):
    model = kit.tiny()
    torch.save({"ema": model.state_dict(), "epoch": 3, name: BESIDE[name]}, tmp_path / "x.pt")
    kit.same(DiT.from_pretrained(tmp_path / "x.pt", num_heads=4), model)


def refusal(call) -> str:
    try:
        call()
    except (pickle.UnpicklingError, ValueError) as error:
        return str(error)
    return ""


def test_numbers_that_an_older_numpy_wrote(kit, tmp_path, monkeypatch):
    """numpy._core was numpy.core before version 2; both versions read both kinds of file."""
    torch.save(
        {"ema": kit.tiny().state_dict(), "loss": np.float64(1.5)},
        tmp_path / "x.pt",
        _use_new_zipfile_serialization=False,
    )
    content = (tmp_path / "x.pt").read_bytes()
    for core in (b"numpy._core.multiarray", b"numpy.core.multiarray"):
        (tmp_path / "y.pt").write_bytes(content.replace(b"cnumpy._core.multiarray", b"c" + core))
        assert len(find_model(tmp_path / "y.pt")) == len(kit.tiny().state_dict())


@pytest.mark.parametrize(
    "save",
    [
        lambda state, path: torch.save({"ema": state, "extra": slice(3)}, path),
        lambda state, path: torch.save({"ema": state, "extra": np.float64(1)}, path, pickle_protocol=4),
        lambda state, path: torch.jit.script(torch.nn.Linear(2, 2)).save(str(path)),
        lambda state, path: torch.save(torch.nn.Linear(2, 2), path),
    ],
    ids=["class", "protocol", "TorchScript", "module"],
)
@pytest.mark.filterwarnings("ignore")
def test_no_error_suggests_executing_the_file(kit, tmp_path, save):
    save(kit.tiny().state_dict(), tmp_path / "x.pt")
    text = refusal(lambda: find_model(tmp_path / "x.pt"))
    assert "x.pt is" in text and "weights_only" not in text and "trust" not in text and "\n" not in text


def test_a_damaged_download_is_named(monkeypatch, tmp_path):
    """A file left in torch.hub's folder that is truncated or something else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    for content in (b"", b"<html>", pickle.dumps(np.float64(1), protocol=4)):
        (tmp_path / "checkpoints" / "DiT-XL-2-256x256.pt").write_bytes(content)
        text = refusal(lambda: find_model("DiT-XL-2-256x256.pt"))
        assert text.startswith("DiT-XL-2-256x256.pt is ") and "weights_only" not in text


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."])
@pytest.mark.parametrize("kind", ["pt", "ema", "safetensors"])
def test_names_of_wrappers(kit, tmp_path, prefix, kind):
    model = kit.tiny()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    path = tmp_path / f"x.{kind}"
    if kind == "safetensors":
        __import__("safetensors.torch").torch.save_file(state, path)
    else:
        torch.save(state if kind == "pt" else {"ema": state}, path)
    kit.same(DiT.from_pretrained(path, num_heads=4), model)


def test_names_that_real_wrappers_give(kit, tmp_path):
    """The whole model and its blocks: compiled, averaged, checkpointed."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, wrapped = kit.tiny(), kit.tiny()
    wrapped.blocks[0] = torch.compile(wrapped.blocks[0])
    wrapped.blocks[1] = checkpoint_wrapper(wrapped.blocks[1])
    average = torch.optim.swa_utils.AveragedModel(torch.compile(wrapped))
    for each in (wrapped, torch.nn.DataParallel(wrapped), torch.compile(wrapped), average):
        torch.save(each.state_dict(), tmp_path / "x.pt")
        assert any("_orig_mod" in name for name in each.state_dict())
        kit.same(DiT.from_pretrained(tmp_path / "x.pt", num_heads=4), model)


def test_a_prefix_of_only_some_names_is_kept(kit, tmp_path):
    state = {"module.weight": torch.ones(1), "bias": torch.ones(1)}
    torch.save(state, tmp_path / "x.pt")
    assert find_model(tmp_path / "x.pt").keys() == state.keys()
    torch.save({"module": torch.ones(1)}, tmp_path / "x.pt")
    assert find_model(tmp_path / "x.pt").keys() == {"module"}


@pytest.mark.parametrize("kind", [argparse.Namespace, types.SimpleNamespace, dict])
def test_heads_are_read_from_the_files_arguments(kit, tmp_path, kind):
    model = kit.tiny()
    torch.save({"ema": model.state_dict(), "args": kind(num_heads=4, num_classes=5, lr=1e-4)}, tmp_path / "x.pt")
    loaded = DiT.from_pretrained(tmp_path / "x.pt")
    kit.same(loaded, model)
    assert loaded.config == model.config
    assert DiT.from_pretrained(tmp_path / "x.pt", num_heads=2).num_heads == 2


def test_a_missing_null_label_is_read_from_the_files_arguments(kit, tmp_path):
    model = kit.tiny(class_dropout_prob=0.0)
    torch.save({"ema": model.state_dict(), "args": argparse.Namespace(num_classes=5, num_heads=4)}, tmp_path / "x.pt")
    assert DiT.from_pretrained(tmp_path / "x.pt").config == model.config


def test_a_rectangles_size_is_read_from_the_files_arguments(kit, tmp_path):
    model = kit.tiny(input_size=(4, 12))
    torch.save({"ema": model.state_dict(), "args": {"input_size": [4, 12], "num_heads": 4}}, tmp_path / "x.pt")
    assert DiT.from_pretrained(tmp_path / "x.pt").config == model.config
