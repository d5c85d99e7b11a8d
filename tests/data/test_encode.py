"""Latent files: contents, two processes, interruptions, and errors."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ditfast.data import DataError, open_data
from ditfast.data.folder import Images
from ditfast.data.shards import Shards
from ditfast.encode import main, parse_options, run_rank
from ditfast.ranks import Ranks

load_file = pytest.importorskip("safetensors.torch").load_file


def shards(folder):
    """The bytes of each shard by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def tensors(folder):
    """The tensors of all shards, as one."""
    files = [load_file(path) for path in sorted(folder.glob("*.safetensors"))]
    return {name: torch.cat([each[name] for each in files]) for name in files[0]}


def break_image(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.fixture
def written(monkeypatch):
    """The numbers of the shards that are written."""
    numbers, write = [], Shards.write

    def note(self, shard, *args):
        write(self, shard, *args)
        numbers.append(shard)

    monkeypatch.setattr(Shards, "write", note)
    return numbers


def fail_after(monkeypatch, count, error):
    """Raise in the middle of writing shard number ``count``; return a function that repairs the disk."""
    write, done = Path.write_bytes, []

    def fail(self, content):
        if len(done) == count:
            write(self, content[:100])
            raise error
        done.append(self)
        return write(self, content)

    monkeypatch.setattr(Path, "write_bytes", fail)
    return lambda: monkeypatch.setattr(Path, "write_bytes", write)


def test_shards_hold_the_posteriors_of_images_and_mirror_images(tree, encode, posterior):
    made, images = tensors(encode()), Images(tree, 12, flip=False)
    assert made["labels"].tolist() == [0] * 3 + [1] * 5 + [2] * 3
    assert set(made) == {"mean", "std", "mean_flip", "std_flip", "labels", "checksums"}
    for index in range(11):
        x, _ = images.read(index, None)
        for suffix, picture in (("", x), ("_flip", x.flip(2))):
            mean, std = posterior(picture)
            torch.testing.assert_close(made["mean" + suffix][index], mean, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(made["std" + suffix][index], std, atol=1e-5, rtol=1e-5)
    assert made["mean"].dtype == torch.float32 and made["mean"].shape == (11, 4, 6, 6)
    assert (made["mean_flip"] - made["mean"].flip(3)).abs().max() > 1e-2  # the mirror image is encoded, not mirrored


def test_the_index(tree, encode, capsys):
    folder = encode()
    assert capsys.readouterr().out == f"classes: 0 ant, 1 bee, 2 cat\n11 images in {folder}\n"
    index = json.loads((folder / "latents.json").read_text())
    counts = [("latents-00000.safetensors", 4), ("latents-00001.safetensors", 4), ("latents-00002.safetensors", 3)]
    assert [(each["file"], each["count"]) for each in index["shards"]] == counts
    assert index["format"] == 1 and index["count"] == 11 and index["classes"] == ["ant", "bee", "cat"]
    assert index["scale"] == 0.18215 and index["image_size"] == 12 and index["shape"] == [4, 6, 6]
    assert index["vae"] == "tiny" and len(index["vae_checksum"]) == 8 and index["unreadable"] == []
    assert sorted(path.name for path in folder.iterdir()) == [
        "encode.json",
        *(name for name, _ in counts),
        "latents.json",
    ]


def test_half_precision_files(tree, encode):
    exact, half = tensors(encode()), tensors(encode("--dtype", "fp16", out="half"))
    assert half["mean"].dtype == half["std_flip"].dtype == torch.float16
    for name in ("mean", "std", "mean_flip", "std_flip"):
        assert torch.equal(half[name], exact[name].half())


def test_workers_and_batches_read_the_same(tree, encode):
    alone = encode()
    assert shards(encode("--workers", 2, out="two")) == shards(alone)
    one = tensors(encode("--batch", 1, out="one"))
    one.pop("checksums")  # there are some of every digit
    for name, value in one.items():
        torch.testing.assert_close(value, tensors(alone)[name], atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_write_the_same_as_one(tree, vae, encode, tmp_path):
    alone = encode()
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    options = ("--data", tree, "--out", tmp_path / "two", "--vae", vae, "--image-size", "12", "--shard-size", "4")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, "-m", "ditfast.encode", *options, "--batch", "3", "--workers", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("11 images in") == 1  # only the first rank prints
    assert shards(tmp_path / "two") == shards(alone) and len(shards(alone)) == 3
    assert (tmp_path / "two/latents.json").read_bytes() == (alone / "latents.json").read_bytes()


def test_a_rank_takes_every_second_shard_that_is_missing(tree, encode, vae, monkeypatch, tmp_path):
    (encode(shard=2) / "latents-00001.safetensors").unlink()  # of six
    for shard in (2, 4, 5):
        (tmp_path / "out" / f"latents-0000{shard}.safetensors").unlink()
    monkeypatch.setattr(Ranks, "wait", lambda self: None)
    shared = ["--data", str(tree), "--out", str(tmp_path / "out"), "--vae", vae, "--image-size", "12"]
    run_rank(parse_options([*shared, "--shard-size", "2", "--workers", "0"]), Ranks(1, 2, "cpu"))
    assert [name[8:13] for name in shards(tmp_path / "out")] == ["00000", "00002", "00003", "00005"]


def test_an_interrupted_run_resumes(tree, encode, refusal, written, monkeypatch, tmp_path):
    whole = shards(encode(out="whole"))
    written.clear()
    repair = fail_after(monkeypatch, 2, KeyboardInterrupt())
    assert refusal().startswith("interrupted: finished shards are kept")
    repair()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["encode.json", "latents-00000.safetensors", "latents-00001.safetensors"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert shards(encode("--batch", 4)) == whole
    assert written == [0, 1, 2]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_an_unfinished_folder_says_how_to_resume(tree, encode, refusal, written, monkeypatch, tmp_path):
    repair = fail_after(monkeypatch, 1, KeyboardInterrupt())
    refusal()
    repair()
    with pytest.raises(DataError, match="out is not finished: resume with python -m ditfast.encode --data") as raised:
        open_data(str(tmp_path / "out"))
    words = shlex.split(str(raised.value).split("resume with ")[1])
    main([*words[3:], "--workers", "0"])
    assert written == [0, 1, 2] and open_data(str(tmp_path / "out")).count == 11


def test_a_full_disk_is_one_line_and_keeps_finished_shards(tree, encode, refusal, written, monkeypatch, tmp_path):
    repair = fail_after(monkeypatch, 1, OSError(errno.ENOSPC, "No space left on device"))
    message = refusal()
    assert "latents-00001.safetensors: No space left on device" in message and "to resume" in message
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["encode.json", "latents-00000.safetensors"]
    repair()
    assert len(shards(encode())) == 3 and written == [0, 1, 2]


def test_a_finished_run_is_not_redone(tree, encode, written):
    first = shards(encode())
    assert shards(encode("--overwrite")) == first and written == [0, 1, 2]
    (encode() / "latents-00001.safetensors").unlink()
    assert shards(encode()) == first and written == [0, 1, 2, 1]


def test_other_settings_are_rejected_unless_overwriting(tree, encode, refusal, other_vae, written, tmp_path):
    first = shards(encode())
    assert "vae_checksum was" in refusal(vae=other_vae)
    message = refusal(size=16)
    assert "image_size was 12, is 16" in message and "--overwrite" in message
    assert 'dtype was "fp32", is "fp16"' in refusal("--dtype", "fp16")
    assert "shard_size was 4, is 5" in refusal(shard=5)
    (tree / "bee/0.png").rename(tree / "bee/a.png")
    message = refusal()
    assert "file_names was" in message and "class_names" not in message and "count" not in message
    assert shards(tmp_path / "out") == first and (tmp_path / "out/latents.json").exists()
    (tmp_path / "out/notes.txt").write_text("mine")
    assert len(shards(encode("--overwrite", shard=6))) == 2
    assert (tmp_path / "out/notes.txt").read_text() == "mine"
    assert open_data(str(tmp_path / "out")).count == 11 and written == [0, 1, 2, 0, 1]


def test_a_folder_being_overwritten_is_not_read(tree, encode, refusal, monkeypatch, tmp_path):
    encode()
    fail_after(monkeypatch, 1, KeyboardInterrupt())
    refusal("--overwrite", "--dtype", "fp16")
    with pytest.raises(DataError, match="is not finished"):
        open_data(str(tmp_path / "out"))


def test_an_unrelated_folder_is_left_alone(tree, refusal, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/latents-00000.safetensors").write_bytes(b"mine")
    for options in ((), ("--overwrite",)):
        assert "holds other files but no encode.json" in refusal(*options)
    assert [path.read_bytes() for path in (tmp_path / "out").iterdir()] == [b"mine"]
    assert "is not a folder" in refusal(out="images/ant/0.png")


def test_unreadable_settings_are_another_run(tree, encode, refusal, tmp_path):
    encode()
    (tmp_path / "out/encode.json").write_text("[1")
    assert "encode.json cannot be read" in refusal()
    assert len(shards(encode("--overwrite"))) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_and_can_be_skipped(tree, encode, refusal, written, workers, capsys):
    whole = encode(out="whole")
    written.clear()
    break_image(tree / "bee/3.png")  # image 6, in the second shard
    options = ("--workers", workers)
    message = refusal(*options)
    assert "bee/3.png cannot be read" in message and "--unreadable skip" in message and "in worker" not in message
    capsys.readouterr()
    folder = encode("--unreadable", "skip", *options)
    assert written == [0, 1, 2]  # the first was done
    said = capsys.readouterr()
    assert "10 images in" in said.out and "1 skipped" in said.out
    assert f"skipped: {tree / 'bee/3.png'} cannot be read" in said.err
    index = json.loads((folder / "latents.json").read_text())
    assert index["unreadable"] == ["bee/3.png"] and index["count"] == 10
    assert [each["count"] for each in index["shards"]] == [4, 3, 3]
    kept = torch.tensor([i for i in range(11) if i != 6])
    for name, value in tensors(folder).items():
        torch.testing.assert_close(value, tensors(whole)[name][kept], atol=1e-5, rtol=1e-5)


def test_skipped_images_stay_counted_when_the_run_resumes(tree, encode, refusal, written, monkeypatch):
    for name in ("ant/0.png", "bee/4.png"):  # the first and the second shard
        break_image(tree / name)
    repair = fail_after(monkeypatch, 1, KeyboardInterrupt())
    refusal("--unreadable", "skip")
    repair()
    index = json.loads((encode("--unreadable", "skip") / "latents.json").read_text())
    assert written == [0, 1, 2] and index["count"] == 9 and index["unreadable"] == ["ant/0.png", "bee/4.png"]


def test_a_shard_of_broken_images_is_empty(tree, encode):
    for i in range(1, 5):
        break_image(tree / f"bee/{i}.png")  # images 4 to 7
    folder = encode("--unreadable", "skip")
    source = open_data(str(folder))
    assert source.count == 7
    assert [source.read(i, torch.Generator())[1] for i in range(7)] == [0, 0, 0, 1, 2, 2, 2]


def test_no_readable_image_is_an_error(tree, refusal, tmp_path):
    for path in tree.glob("*/*.png"):
        break_image(path)
    assert refusal("--unreadable", "skip") == "error: no image is readable"
    assert not (tmp_path / "out/latents.json").exists()


def test_non_finite_values_are_rejected(tree, refusal, vae, tmp_path):
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(vae)
    torch.nn.init.constant_(model.quant_conv.bias, float("nan"))
    model.save_pretrained(tmp_path / "nan")
    assert "not finite" in refusal(vae=tmp_path / "nan")
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ((), {"size": 13}, "--image-size must be a multiple of 2 for --vae .*, got 13"),
        ((), {"size": 0}, "--image-size must be at least 1, got 0"),
        ((), {"shard": 0}, "--shard-size must be at least 1, got 0"),
        (("--batch", 0), {}, "--batch must be at least 1, got 0"),
        (("--workers", -1), {}, "--workers must be at least 0, got -1"),
        (("--dtype", "bf16"), {}, "invalid choice: 'bf16'"),
        ((), {"data": "nowhere"}, "--data must be a folder of images, got '.*nowhere'"),
        ((), {"data": "nowhere", "vae": "nowhere"}, "--data must be a folder"),  # the quicker check is first
        ((), {"vae": "nowhere"}, "--vae must be ema, mse or a folder, got '.*nowhere'"),
    ],
)
def test_bad_options(tree, refusal, options, changes, message, tmp_path):
    assert re.search(message, refusal(*options, **changes))
    assert not (tmp_path / "out").exists()
