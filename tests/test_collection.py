"""Tests are collected without any extra installed, and gpu_suite.py names every module with GPU tests."""

import re
import subprocess
import sys
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest

from harness.suite.stages import GPU_TESTS

ROOT = Path(__file__).parents[1]
PLAIN_PYTEST = """
import sys
for name in sys.argv[1].split():
    sys.modules[name] = None  # its import fails
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests"]))
"""


def modules_of_extras() -> set[str]:
    """Everything importable with all extras installed, and the compiled extension."""
    extras = {re.match(r"[\w-]+", line)[0] for line in requires("ditfast") if "extra ==" in line}
    extras -= {"ditfast", "pytest"}
    return {name for name, owners in packages_distributions().items() if extras & set(owners)} | {"ditfast._C"}


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """pytest's output when it collects the GPU tests without any extra."""
    command = [sys.executable, "-c", PLAIN_PYTEST, " ".join(modules_of_extras())]
    environment = {"PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_extras_are_known():
    assert {"diffusers", "sklearn", "tyro"} & modules_of_extras()


def test_every_module_is_collected_without_extras(collected):
    assert collected.returncode == 0, collected.stdout[-5000:] + collected.stderr


def test_the_suite_names_every_module_with_gpu_tests(collected):
    modules = {line.split("::")[0] for line in collected.stdout.splitlines() if "::" in line}
    assert "tests/gpu/test_parity.py" in modules
    assert not [name for name in modules if not name.startswith(GPU_TESTS)]
