"""A new operation in one file is known to backend choice, self-check, FLOP counts, `verify` and the doctor."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def run_toy(tmp_path, **environment):
    environment = {**os.environ, "DITFAST_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "1", **environment}
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("toy.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_correct_kernel(tmp_path):
    found = run_toy(tmp_path)
    assert found["automatic"] == found["named"] == ["triton", "triton"] and found["context"] == ["reference"]
    assert found["verify"] == {"triton torch.bfloat16 32": None, "triton torch.float32 32": None}
    assert found["flops"] == 3 * 2 * (2 * 3 * 16 * 5)
    assert found["doctor"] == {"triton": None, "reference": None}


def test_a_wrong_gradient(tmp_path):
    found = run_toy(tmp_path, TOY_FACTOR="1.1")
    assert found["automatic"] == ["reference", "reference"] and found["named"] == ["triton", "triton"]
    assert all(reason.startswith("dx: ") for reason in found["verify"].values()) and len(found["verify"]) == 2
