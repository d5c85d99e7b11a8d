"""Without the extension, or with one that does not load, the rest of the package works and says what is missing."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import ditfast
from ditfast.load_extension import why_cut_short

ROOT = Path(__file__).resolve().parents[1]
BINARY = next((ROOT / "ditfast").glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"), None)
needs_elf = pytest.mark.skipif(
    BINARY is None or not sys.platform.startswith("linux"), reason="needs the extension of a Linux"
)
CODE = """
import ditfast, sys
print(ditfast.__file__)
import torch
from ditfast import doctor, ops
h, rows = torch.randn(2, 5, 16), torch.randn(2, 2, 16).unbind(1)
expected = ops.layer_norm_modulate(h, *rows, backend="reference")
assert torch.equal(ops.layer_norm_modulate(h, *rows), expected)
torch.testing.assert_close(ops.layer_norm_modulate(h, *rows, backend="triton"), expected)
try:
    ops.layer_norm_modulate(h, *rows, backend="host")
except RuntimeError as error:
    print(error)
sys.argv = ["doctor"]
doctor.main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel without the extension."""
    folder = tmp_path_factory.mktemp("pure")
    build = ("egg_info", "--egg-base", folder, "build", "--build-base", folder / "build")
    command = (sys.executable, "setup.py", "-q", *build, "bdist_wheel", "--dist-dir", folder)
    environment = {**inherited(), "DITFAST_PURE": "1", "CXX": "/nowhere/c++"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture
def installed(wheel, tmp_path):
    """The unpacked wheel."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "lib")
    return tmp_path / "lib"


def inherited():
    return {key: value for key, value in os.environ.items() if not key.startswith(("DITFAST_", "PYTHON"))}


def report(lib):
    """Output of the package in ``lib``: why the CPU kernels do not run, and the doctor's lines."""
    # without the hooks of an editable installation, which would find its extension
    paths = [str(lib), *(path for path in sys.path if path.endswith("-packages"))]
    environment = inherited() | {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-S", "-c", CODE]
    done = subprocess.run(
        command, cwd=lib, env=environment | {"DITFAST_CACHE_DIR": str(lib)}, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    file, *lines = done.stdout.splitlines()
    assert Path(file) == lib / "ditfast/__init__.py"
    return lines


def test_pure_wheel(wheel):
    assert wheel.name == f"ditfast-{ditfast.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in names if name.endswith((".so", ".pyd", ".cpp", ".cu"))]
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ditfast").rglob("*.py")}
    kernels = {f"ditfast/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}
    assert modules | kernels == {name for name in names if name.endswith(".py")}
    assert {"ditfast/py.typed", "ditfast/assets/digits/model.safetensors"} <= names
    assert {name.split("/")[0] for name in names} == {"ditfast", f"ditfast-{ditfast.__version__}.dist-info"}


def test_pure_package(installed):
    error, *lines = report(installed)
    assert error == "layer_norm_modulate: backend 'host' cannot run: the extension ditfast._C is not built"
    assert "extension    missing (ditfast._C is not installed)" in lines
    assert "Ready on cpu tensors, with plain PyTorch, since no kernel runs here" in lines


def cut(share):
    return lambda: BINARY.read_bytes()[: int(share * BINARY.stat().st_size)]


def library_of_something_else():
    import _ctypes

    return Path(_ctypes.__file__).read_bytes()


@needs_elf
@pytest.mark.parametrize(
    "content, reason",
    [
        (cut(0.3), "is truncated: "),  # loading it would kill the process
        (library_of_something_else, "dynamic module does not define module export function"),
    ],
)
def test_an_extension_that_does_not_load(installed, content, reason):
    (installed / "ditfast" / BINARY.name).write_bytes(content())
    error, *lines = report(installed)
    why = "layer_norm_modulate: backend 'host' cannot run: the extension ditfast._C does not load: "
    assert error.startswith(why) and reason in error
    (line,) = [line for line in lines if line.startswith("extension ")]
    assert "missing (ImportError: " in line and reason in line


@needs_elf
def test_an_intact_extension_is_accepted(tmp_path):
    assert why_cut_short(str(BINARY)) is None
    assert why_cut_short(__file__) is None
    assert why_cut_short(str(short(tmp_path, BINARY.stat().st_size - 1))) is None  # unmapped parts may be missing
    assert " bytes or more" in why_cut_short(str(short(tmp_path, 64)))


def short(folder, size):
    path = folder / f"{size}.so"
    path.write_bytes(BINARY.read_bytes()[:size])
    return path
