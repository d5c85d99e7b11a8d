"""Builds ditfast._C with CMake and maps kernels/ to ditfast.kernels; the rest is in pyproject.toml.

DITFAST_PURE=1 omits the extension (Triton and the reference remain), DITFAST_SKIP_CUDA=1 builds only its host part,
DITFAST_CUDA_ARCHS="80;90" selects the device code, MAX_JOBS limits how many compilers run at once. DITFAST_WERROR=1
makes warnings errors, as in CI: a compiler that is newer than this code may have new ones.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# include the virtual environment's scripts even if it is not activated
SEARCH_PATH = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def is_on(variable: str) -> bool:
    return os.environ.get(variable, "0").lower() in ("1", "on", "true", "yes")


def need(tool: str) -> str:
    path = shutil.which(tool, path=SEARCH_PATH)
    if path is None:
        sys.exit(f"ditfast: {tool} was not found, and building needs it (pip install {tool})")
    return path


def need_compiler() -> None:
    names = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++", "cl"]
    if not any(shutil.which(name) for name in names):
        sys.exit(f"ditfast: no C++ compiler ({', '.join(names)}): install one, or set CXX to yours")


def build_dir() -> Path:
    """One directory per toolchain: CMake's cache keeps the first compiler and source path it sees."""
    toolchain = [str(ROOT), sys.version, *(os.environ.get(name, "") for name in ("CC", "CXX", "CUDACXX"))]
    return ROOT / "build" / f"cmake-{hashlib.sha256(repr(toolchain).encode()).hexdigest()[:8]}"


class CMakeExtension(Extension):
    def __init__(self, name: str):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: CMakeExtension) -> None:
        import pybind11  # imported here, so that an sdist can be built without it

        need_compiler()
        build, cmake = build_dir(), need("cmake")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": need("ninja"),
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": build / "lib",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "DITFAST_VERSION": self.distribution.get_version(),
            "DITFAST_SKIP_CUDA": "ON" if is_on("DITFAST_SKIP_CUDA") else "OFF",
            "CMAKE_COMPILE_WARNING_AS_ERROR": "ON" if is_on("DITFAST_WERROR") else "OFF",
        }
        archs = os.environ.get("DITFAST_CUDA_ARCHS")
        choices = [f"-D{name}={value}" for name, value in options.items()]
        # -U: an earlier choice must not survive in the cache
        choices.append(f"-DDITFAST_CUDA_ARCHS={archs}" if archs else "-UDITFAST_CUDA_ARCHS")
        jobs = ["--parallel", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []

        self.cmake(cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *choices)
        self.cmake(cmake, "--build", str(build), "--target", "_C", *jobs)

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(build / "lib" / self.get_ext_filename("_C"), target)

    @staticmethod
    def cmake(*command: str) -> None:
        sys.stdout.flush()  # keeps our output and CMake's in order
        if code := subprocess.call(command):
            sys.exit(f"ditfast: building ditfast._C failed (status {code}); the compiler's message is above")


setup(
    packages=[
        *find_packages(include=["ditfast", "ditfast.*"]),
        "ditfast.kernels",
        *(f"ditfast.kernels.{name}" for name in find_packages(str(ROOT / "kernels"))),
    ],
    package_dir={"ditfast.kernels": "kernels"},
    ext_modules=[] if is_on("DITFAST_PURE") else [CMakeExtension("ditfast._C")],
    cmdclass={"build_ext": CMakeBuild},
)
