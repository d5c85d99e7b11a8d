"""Two processes draw the same images as one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch.distributed as dist

from ditfast.ranks import Ranks, joined_ranks
from ditfast.sample import main, parse_options, run_rank


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_draw_the_same_as_one(run, ckpt, tmp_path):
    alone = run("--num-samples", 5)
    options = ("--ckpt", ckpt, "--decoder", "pixel", "--steps", "4", "--num-samples", "5", "--batch", "2")
    files = ("--out", tmp_path / "two", "--npz", tmp_path / "two.npz")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, "-m", "ditfast.sample", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 images in") == 1  # only the first rank prints
    with np.load(tmp_path / "two.npz") as saved:
        np.testing.assert_allclose(saved["arr_0"].astype(int), alone.astype(int), atol=1)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"WORLD_SIZE": "2"}, "the environment has WORLD_SIZE=2 but not RANK, MASTER_ADDR, MASTER_PORT: start all"),
        (
            {"RANK": "0", "MASTER_ADDR": "a"},
            "the environment has RANK=0, MASTER_ADDR=a but not WORLD_SIZE, MASTER_PORT",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer, got 'two' in the environment"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK must be below the number of GPUs, 1, got 3"),
    ],
)
def test_an_environment_not_from_torchrun(ckpt, tmp_path, monkeypatch, environment, said):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if "LOCAL_RANK" in environment:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SystemExit, match=f"^error: {said}"):
        main(["--ckpt", ckpt, "--num-samples", "1", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_an_empty_variable_counts_as_unset(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("MASTER_ADDR")
    with joined_ranks() as ranks:
        assert ranks[:2] == (0, 1)


def test_a_rank_takes_every_second_sample(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "wait", lambda self: None)
    shared = ("--ckpt", ckpt, "--decoder", "pixel", "--steps", "1", "--num-samples", "5")
    options = parse_options([*shared, "--out", str(tmp_path / "two"), "--grid", str(tmp_path / "g.png")])
    (tmp_path / "two").mkdir()
    run_rank(options, Ranks(1, 2, "cpu"))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["000001.png", "000003.png"]
    assert not (tmp_path / "g.png").exists()  # the first rank's
