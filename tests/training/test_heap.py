"""Memory freed by a step stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

from ditfast.training import heap

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be configured")

STEPS = """
import resource
from ditfast.training.heap import keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytearray(b"x" * 2**22) for _ in range(24)]  # 96 MiB
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print([faults_of_a_step() for _ in range(4)][-1])
"""


def last_faults(**tuned):
    clean = {name: value for name, value in os.environ.items() if name not in heap._TUNED_BY}
    command = [sys.executable, "-c", STEPS]
    return int(subprocess.run(command, env=clean | tuned, capture_output=True, text=True, check=True).stdout)


def test_a_step_touches_no_new_pages():
    assert last_faults() < 1000


def test_the_environment_takes_precedence():
    assert last_faults(MALLOC_TRIM_THRESHOLD_="1000000") > 20_000
