"""What an installed wheel must do: a few tests that need no other file of the repository."""

import importlib
import os
import re
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import ditfast

TAGS = re.findall(r"^Tag: (\S+)", distribution("ditfast").read_text("WHEEL") or "", re.MULTILINE)
GLIBC = re.search(r"manylinux_2_(\d+)", " ".join(TAGS))
PURE = "py3-none-any" in TAGS


@pytest.fixture(scope="module")
def extension():
    """`ditfast._C`. It is an error if it is missing or does not load, except in a pure wheel."""
    if PURE:
        pytest.skip("a wheel without the extension")
    return importlib.import_module("ditfast._C")


def seeded_model() -> ditfast.DiT:
    """A small DiT without zero weights."""
    torch.manual_seed(0)
    model = ditfast.DiT(input_size=8, patch_size=2, in_channels=4, hidden_size=128, depth=2, num_heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def output_and_gradients(model, backend) -> list[torch.Tensor]:
    torch.manual_seed(1)
    inputs = torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 995]), torch.tensor([0, 1, 999])
    with ditfast.use_backend(backend):
        out = model(*inputs)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [out, *torch.autograd.grad(out.square().mean(), weights)]


def assert_is_the_reference(backend):
    model = seeded_model()
    results, expected = output_and_gradients(model, backend), output_and_gradients(model, "reference")
    for ours, reference in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_the_extension_is_there_unless_the_wheel_is_pure():
    assert TAGS and (find_spec("ditfast._C") is None) == PURE


def test_a_model_on_the_available_kernels_matches_the_reference():
    assert_is_the_reference("auto")


def test_the_extension_belongs_to_the_package(extension):
    assert extension.build_config()["version"] == ditfast.__version__
    assert extension.isa() in extension.isas()


def test_gpu_code_is_what_the_build_requested(extension):
    expected = os.environ.get("DITFAST_EXPECTED_CUDA")
    if expected is None:
        pytest.skip("DITFAST_EXPECTED_CUDA names none")
    assert set(extension.build_config()["architectures"]) == set(expected.split(","))


@pytest.mark.skipif(GLIBC is None, reason="not a manylinux wheel")
def test_no_symbol_is_newer_than_the_tags_glibc(extension):
    needed = re.findall(rb"GLIBC_2\.(\d+)", Path(extension.__file__).read_bytes())
    assert needed and max(map(int, needed)) <= int(GLIBC[1])


def test_a_model_on_the_cpu_kernels_matches_the_reference(extension):
    default = extension.isa()
    try:
        for isa in extension.isas():
            extension.use_isa(isa)
            assert_is_the_reference("host")
    finally:
        extension.use_isa(default)
