"""What a step frees stays with the process: after the call, in benchmarks, and in the commands on a CPU."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ditfast import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be configured")

STEPS = """
import resource, sys
from types import SimpleNamespace

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x" * 2**22) for _ in range(24)]  # 96 MiB
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def main():
    print([faults_of_a_step() for _ in range(4)][-1])
"""
CALL = "import ditfast; ditfast.keep_freed_memory(); main()"
BENCHMARK = f"""
sys.path.insert(0, {str(Path(__file__).parents[1] / "benchmarks")!r})
from harness.start import start
sys.modules["harness.steps.command"] = SimpleNamespace(main=main)
start("steps")
"""


def last_faults(code, **tuned):
    clean = {name: value for name, value in os.environ.items() if name not in heap._TUNED_BY}
    command = [sys.executable, "-c", STEPS + code]
    return int(subprocess.run(command, env=clean | tuned, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("code", [CALL, BENCHMARK], ids=["call", "benchmark"])
def test_a_step_touches_no_new_pages(code):
    assert last_faults(code) < 1000


def test_the_environment_takes_precedence():
    assert last_faults(CALL, MALLOC_TRIM_THRESHOLD_="1000000") > 20_000
