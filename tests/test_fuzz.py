"""A short fuzz run, and proof that the fuzzer notices faults."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fuzzing.case import Case, End, find_fault
from fuzzing.child import run_case

for module in ("diffusers", "PIL", "sklearn", "tensorboard", "tqdm", "tyro", "yaml", "safetensors"):
    pytest.importorskip(module)
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")


@linux
def test_no_fault_is_found():
    command = [sys.executable, str(Path(__file__).with_name("fuzz.py")), "--seed", "0", "--minutes", "0.3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("seed 0\n") and "0 faults in" in done.stdout


BAD = Case("x(depth=-1)", print, True, "depth")


@pytest.mark.parametrize(
    "case, end, printed, fault",
    [
        (BAD, End("refused", "ValueError: depth must be at least 0, got -1"), "", None),
        (BAD, End("accepted"), "", "accepted"),
        (BAD, End("refused", "TypeError: unsupported operand"), "", "refused without depth"),
        (BAD, End("refused", "depth: DefaultCPUAllocator: can't allocate memory"), "", "memory"),
        (BAD, End("crashed", "AttributeError"), "", "crashed"),
        (BAD, End("refused", "depth"), "Traceback (most recent call last):\n", "traceback"),
        (BAD._replace(bad=False), End("accepted"), "", None),
        (BAD._replace(bad=False), End("refused", "depth"), "", "refused: depth"),
        (BAD._replace(bad=None), End("accepted"), "", None),
        (BAD._replace(bad=None), End("refused", "something"), "", None),
        (BAD._replace(is_command=True), End("refused", "exit status 2"), "error: --depth", None),
    ],
)
def test_the_oracle(case, end, printed, fault):
    found = find_fault(case, end, printed)
    assert found is None if fault is None else found.startswith(fault)


def hang():
    while True:
        pass


@linux
@pytest.mark.parametrize(
    "run, end, fault",
    [
        (lambda: bytearray(8 << 30), "crashed", "MemoryError"),
        (hang, "killed", "CPU time"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "killed", "SIGTERM"),
        (lambda: os._exit(0), "lost", "the process exited"),
        (lambda: sys.exit("error: depth"), "refused", None),
        (lambda: None, "accepted", "accepted"),
    ],
)
def test_a_child(monkeypatch, tmp_path, run, end, fault):
    monkeypatch.setattr("fuzzing.child.CPU_SECONDS", 1)
    what, found, why = run_case(lambda: BAD._replace(run=run), tmp_path / "case")
    assert (what, found) == (BAD.what, end) and (why is None if fault is None else fault in why)
    assert not list(tmp_path.iterdir())
