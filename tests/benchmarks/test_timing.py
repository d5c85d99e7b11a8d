"""benchmarks/harness/timing.py and compiling.py: interleaved functions, and the time spent compiling."""

import os
import subprocess
import sys
import time

import pytest
import torch

from harness import timing
from harness.suite.stages import BENCHMARKS

COMPILE_TWICE = """
from harness.compiling import Watch
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget

@triton.jit
def add(x, n: tl.constexpr):
    i = tl.arange(0, n)
    tl.store(x + i, tl.load(x + i) + 1)

watch = Watch()
for _ in range(2):  # the second is in Triton's cache
    source = triton.compiler.ASTSource(add, {"x": "*fp32", "n": "constexpr"}, {(1,): 128})
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
found = watch.result()
assert found["kernels"] == 1 and found["triton_s"] > 0, found
"""


def test_functions_are_interleaved_in_changing_order_and_a_failing_one_is_dropped():
    calls, errors = [], {}

    def fail():
        calls.append("fails")
        if calls.count("fails") > 8:
            raise RuntimeError("no\nmemory")

    functions = {"works": lambda: calls.append("works"), "fails": fail}
    found = timing.measure(functions, 11, "cpu", prepare=lambda: calls.append("prepare"), errors=errors)
    turns = [tuple(calls[i + 1 : i + 4 : 2]) for i in range(0, 32, 4)]
    assert set(turns) == {("works", "fails"), ("fails", "works")} and calls.count("works") == 12
    assert calls.count("prepare") == 12 + 9
    assert set(found) == {"works"} and found["works"]["repeats"] == 11
    assert errors == {"fails": "RuntimeError: no"}
    with pytest.raises(RuntimeError, match="no"):
        timing.measure({"fails": fail}, 1, "cpu")


def test_the_gpu_sleeps_until_the_slowest_function_is_enqueued(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    fast, slow = {"fast": lambda: None}, {"slow": lambda: time.sleep(0.02)}
    fast, slow = (timing.Turns(functions, lambda: None, None) for functions in (fast, fast | slow))
    assert timing._lead_cycles(slow) >= 0.03 * timing.CYCLES_PER_SECOND
    assert timing._lead_cycles(fast) == pytest.approx(timing.LEAD_SECONDS * timing.CYCLES_PER_SECOND)


def test_kernels_that_triton_compiles_are_counted(tmp_path):
    pytest.importorskip("triton")
    (tmp_path / "twice.py").write_text(COMPILE_TWICE)
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(BENCHMARKS)}
    program = [sys.executable, str(tmp_path / "twice.py")]
    done = subprocess.run(program, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
