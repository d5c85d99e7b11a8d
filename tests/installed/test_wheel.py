"""What a wheel must do where it was installed: few tests, without any file of the repository."""

import os
import re
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch

import ditfast

_C = pytest.importorskip("ditfast._C", reason="built without the extension")
TAGS = re.findall(r"^Tag: (\S+)", distribution("ditfast").read_text("WHEEL") or "", re.MULTILINE)
GLIBC = re.search(r"manylinux_2_(\d+)", " ".join(TAGS))


def test_the_extension_belongs_to_the_package():
    assert _C.build_config()["version"] == ditfast.__version__
    assert _C.isa() in _C.isas()


def test_gpu_code_is_what_the_build_asked_for():
    expected = os.environ.get("DITFAST_EXPECTED_CUDA")
    if expected is None:
        pytest.skip("DITFAST_EXPECTED_CUDA names none")
    assert set(_C.build_config()["architectures"]) == set(expected.split(","))


@pytest.mark.skipif(GLIBC is None, reason="not a manylinux wheel")
def test_no_symbol_is_newer_than_the_glibc_of_the_tag():
    needed = re.findall(rb"GLIBC_2\.(\d+)", Path(_C.__file__).read_bytes())
    assert needed and max(map(int, needed)) <= int(GLIBC[1])


@pytest.mark.parametrize("isa", _C.isas())
def test_a_model_on_the_cpu_kernels_is_the_reference(isa):
    torch.manual_seed(0)
    model = ditfast.DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=128, depth=2, num_heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 995]), torch.tensor([0, 1, 999])
    default, results = _C.isa(), {}
    try:
        _C.use_isa(isa)
        for backend in ("host", "reference"):
            with ditfast.use_backend(backend):
                out = model.eval()(*inputs)
            results[backend] = [out, *torch.autograd.grad(out.square().mean(), weights)]
    finally:
        _C.use_isa(default)
    for ours, reference in zip(results["host"], results["reference"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
