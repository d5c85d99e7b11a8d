"""Rebuild the extension from sources with one change, for one instruction set, in place of ditfast._C."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ditfast

ROOT = Path(ditfast.__file__).resolve().parents[1]
pybind11 = pytest.importorskip("pybind11")
CMAKE, NINJA = (
    shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name) for name in ("cmake", "ninja")
)
BEST = pytest.importorskip("ditfast._C").isas()[-1]


class Planted(NamedTuple):
    """An error: ``wrong`` in place of ``right``, which the check must show."""

    what: str
    file: str
    right: str
    wrong: str
    check: Callable
    isa: str = BEST

    def __str__(self):
        return self.what.replace(" ", "_")


def plant(file, check, *changes, isa=BEST):
    return [Planted(what, f"simd/{file}", right, wrong, check, isa) for what, right, wrong in changes]


def assert_same_on_two_threads(function, results):
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(a, b) for a, b in zip(function(), results, strict=True)), "depends on the threads"
    finally:
        torch.set_num_threads(1)


class Build:
    """A copy of the sources and its build; a change recompiles only what depends on it."""

    def __init__(self, folder: Path, isa: str):
        self.folder, self.isa, self.made = folder, isa, 0
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        shutil.copy(ROOT / "CMakeLists.txt", folder)
        options = {
            "DITFAST_SKIP_CUDA": "ON",
            "DITFAST_ONLY_ISA": isa,
            "CMAKE_CXX_FLAGS_RELEASE": "-O1",
            "CMAKE_COMPILE_WARNING_AS_ERROR": "OFF",  # a change may leave something unused
            "CMAKE_MAKE_PROGRAM": NINJA,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        places = "-S", folder, "-B", folder / "build", "-G", "Ninja"
        self._cmake(*places, *(f"-D{k}={v}" for k, v in options.items()))
        self.extension()

    def extension(self):
        """Build the extension from the current sources, and import it next to earlier ones."""
        self._cmake("--build", self.folder / "build")
        (built,) = (self.folder / "build").glob("_C.*")
        path = self.folder / str(self.made) / built.name
        self.made += 1
        path.parent.mkdir()
        shutil.copy(built, path)
        name = f"{self.isa}_{self.made}._C"  # for a known name, pybind11 returns the existing module
        spec = importlib.util.spec_from_loader(name, ExtensionFileLoader(name, str(path)))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.isa() == self.isa
        return module

    def mutant(self, file: str, right: str, wrong: str):
        """The extension with ``right`` replaced in a file of csrc/host, where it must occur exactly once."""
        source = self.folder / "csrc" / "host" / file
        text = source.read_text()
        assert text.count(right) == 1, f"{right!r} occurs {text.count(right)} times in {file}"
        source.write_text(text.replace(right, wrong))
        try:
            return self.extension()
        finally:
            source.write_text(text)

    @staticmethod
    def _cmake(*arguments):
        done = subprocess.run([CMAKE, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-3000:])
