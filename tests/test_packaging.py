"""Contents of the sdist and the wheel, and how `make` fails."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ditfast

ROOT = Path(__file__).resolve().parents[1]


def run(*command, cwd=ROOT, **env):
    # a `make` that runs pytest must not influence the one in a test
    inherited = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "VENV")}
    return subprocess.run(list(map(str, command)), cwd=cwd, env={**inherited, **env}, capture_output=True, text=True)


def sources(folder: str, *suffixes: str) -> set[str]:
    files = (ROOT / folder).rglob("*")
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix in suffixes}


def test_one_version():
    assert importlib.metadata.version("ditfast") == ditfast.__version__


def test_sdist_carries_what_a_build_needs(tmp_path):
    done = run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path)
    assert done.returncode == 0, done.stderr
    listed = set((tmp_path / "ditfast.egg-info" / "SOURCES.txt").read_text().splitlines())
    needed = {"setup.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"}
    needed |= sources("csrc", ".cpp", ".cu", ".h", ".cuh") | sources("kernels", ".py")
    needed |= sources("ditfast", ".py", ".typed") | sources("ditfast/assets", ".json", ".safetensors", ".md")
    assert not needed - listed
    assert not [name for name in listed if name.startswith(("tests/", "benchmarks/", "build/"))]
    assert not [name for name in listed if name.endswith((".so", ".pyc"))]


def test_data_files_are_installed_with_the_package(tmp_path):
    commands = ("egg_info", "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib")
    done = run(sys.executable, "setup.py", "-q", *commands)
    assert done.returncode == 0, done.stderr
    for model in ("digits", "one-step-digits"):
        installed = {path.name for path in (tmp_path / "lib/ditfast/assets" / model).iterdir()}
        assert installed == {"config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "lib/ditfast/py.typed").is_file()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdist")
    done = run(
        *(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder),
        *("sdist", "--formats", "gztar", "--dist-dir", folder),
    )
    assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("ditfast-*.tar.gz")
    return archive


@pytest.mark.slow
def test_an_index_accepts_the_metadata(sdist):
    pytest.importorskip("twine")
    done = run(sys.executable, "-m", "twine", "check", "--strict", sdist)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_sdist_builds_a_working_wheel(sdist, tmp_path):
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    pip = (sys.executable, "-m", "pip")
    offline = ("--no-index", "--no-deps", "--no-build-isolation")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    done = run(*pip, "wheel", *offline, "-w", tmp_path, source, cwd=tmp_path, DITFAST_SKIP_CUDA="1")
    assert done.returncode == 0, done.stdout + done.stderr

    (wheel,) = tmp_path.glob("ditfast-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    kernels = {name.removeprefix("ditfast/") for name in names if name.startswith("ditfast/kernels/")}
    assert kernels == sources("kernels", ".py")
    assert {name.split("/")[0] for name in names} == {"ditfast", f"ditfast-{ditfast.__version__}.dist-info"}
    assert sum(name.endswith((".so", ".pyd")) for name in names) == 1
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".h"))]

    target = tmp_path / "installed"
    assert run(*pip, "install", *offline, "--target", target, wheel).returncode == 0
    code = "import ditfast.kernels as k, ditfast._C as c; print(k.__file__, c.__file__, c.build_config())"
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(target))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(target)) == 2


def test_kernels_cannot_be_imported_under_another_name():
    done = run(sys.executable, "-c", "import kernels", cwd=ROOT)
    assert done.returncode != 0 and "ditfast.kernels" in done.stderr
    done = run(sys.executable, "-c", "import ditfast.kernels as k; print(k.__file__)", cwd=ROOT.parent)
    assert Path(done.stdout.strip()).parent.name == "kernels", done.stderr


def test_wheels_are_tested_for_the_gpu_code_they_are_built_with():
    tomllib = pytest.importorskip("tomllib")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    built = [arch.split("-") for arch in config["linux"]["environment"]["DITFAST_CUDA_ARCHS"].split(";")]
    prefixes = {"real": "sm", "virtual": "compute"}
    (x86_64,) = config["overrides"]
    expected = x86_64["test-environment"]["DITFAST_EXPECTED_CUDA"].split(",")
    assert expected == [f"{prefixes[kind]}_{number}" for number, kind in built]


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@needs_make
@pytest.mark.parametrize("venv", ["", "{tmp}/venv"])
def test_missing_compiler_is_one_line(tmp_path, venv):
    done = run("make", "test", f"VENV={venv.format(tmp=tmp_path)}", "CXX=/nowhere/c++")
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
    assert said == ["ditfast: no C++ compiler (/nowhere/c++): install one, or set CXX to yours"]
    assert not list(tmp_path.iterdir())


@needs_make
def test_missing_venv_module_is_one_line(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    done = run("make", "bench", f"VENV={tmp_path}/venv", f"PYTHON={python}")
    assert done.returncode != 0
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
    assert len(said) == 1 and "install its venv module" in said[0]


def test_setup_names_the_missing_compiler():
    done = run(sys.executable, "setup.py", "-q", "build_ext", CXX="/nowhere/c++")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ditfast: no C++ compiler (/nowhere/c++)")


@needs_make
@pytest.mark.parametrize("job", ["test", "bench"])
def test_active_environment_gets_only_the_package_and_offline(job):
    plan = run("make", "-n", job, "VENV=").stdout
    installs = [line for line in plan.splitlines() if " pip " in line]
    assert len(installs) == 1
    assert "-e . --no-deps --no-build-isolation" in installs[0]
