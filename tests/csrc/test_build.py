"""How ditfast._C was built: what it reports, what it links, and whether its CUDA half works."""

import re
import shutil
import subprocess

import pytest
import torch

import ditfast

_C = pytest.importorskip("ditfast._C")
# Also in manylinux_2_28: glibc 2.34 moved these functions from libpthread, libdl and librt into libc, under a new
# version; libstdc++'s headers use the variable only if glibc has it.
IN_OLDER_GLIBC = re.compile(r"(pthread_|sem_|dl|shm_)\w+@GLIBC_2\.34|__libc_single_threaded@GLIBC_2\.32")


def test_build_config():
    config = _C.build_config()
    assert list(config) == ["version", "compiler", "build_type", "cuda", "architectures"]
    assert config["version"] == ditfast.__version__
    assert re.fullmatch(r"\w+ \d+(\.\d+)*", config["compiler"])
    assert config["build_type"] == "Release"
    if config["cuda"] is None:
        assert config["architectures"] == []
    else:
        assert re.fullmatch(r"\d+\.\d+", config["cuda"])
        assert config["architectures"]
        assert all(re.fullmatch(r"(sm|compute)_\d+[a-z]?", name) for name in config["architectures"])


def test_binary_is_self_contained():
    """Neither torch nor a CUDA library is linked: one binary serves every version of both."""
    linked = subprocess.run(["ldd", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libc.so" in linked
    assert not re.search(r"libtorch|libc10|libcudart|libcuda\b|not found", linked)


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_manylinux_2_28_has_everything_needed():
    command = ["readelf", "--wide", "--dyn-syms", _C.__file__]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r" UND (\w+@GLIBC_2\.(\d+))", symbols)
    assert needed
    assert not [name for name, minor in needed if int(minor) > 28 and not IN_OLDER_GLIBC.fullmatch(name)]


def test_cuda_probe_says_why_not():
    reason = _C.cuda_probe(4096)
    if _C.build_config()["cuda"] is None:
        assert reason == "built without CUDA"
    else:
        assert re.search("driver|device|ordinal", reason)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.skipif(_C.build_config()["cuda"] is None, reason="the extension is built without CUDA")
def test_cuda_probe_runs():
    device = torch.cuda.current_device()
    assert _C.cuda_probe(device) == ""
    assert torch.cuda.current_device() == device
