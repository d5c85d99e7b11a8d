"""The same images from two processes as from one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch.distributed as dist

from ditfast.ranks import Ranks
from ditfast.sample import parse_options, run_rank


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_two_ranks_draw_what_one_draws(run, ckpt, tmp_path):
    alone = run("--num-samples", 5)
    options = ("--ckpt", ckpt, "--decoder", "pixel", "--steps", "4", "--num-samples", "5", "--batch", "2")
    files = ("--out", tmp_path / "two", "--npz", tmp_path / "two.npz")
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*torchrun, "-m", "ditfast.sample", *options, *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 images in") == 1  # the first rank speaks
    with np.load(tmp_path / "two.npz") as saved:
        np.testing.assert_allclose(saved["arr_0"].astype(int), alone.astype(int), atol=1)


def test_a_rank_takes_every_second_sample(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "wait", lambda self: None)
    shared = ("--ckpt", ckpt, "--decoder", "pixel", "--steps", "1", "--num-samples", "5")
    options = parse_options([*shared, "--out", str(tmp_path / "two"), "--grid", str(tmp_path / "g.png")])
    (tmp_path / "two").mkdir()
    run_rank(options, Ranks(1, 2, "cpu"))
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["000001.png", "000003.png"]
    assert not (tmp_path / "g.png").exists()  # that is the first rank's
