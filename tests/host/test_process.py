"""The CPU kernels and their threads in a process: choice of instruction set, fork, Python threads, exit."""

import os
import subprocess
import sys

import pytest

_C = pytest.importorskip("ditfast._C")

PREAMBLE = """
import os, threading, numpy, torch
from ditfast import _C
from ditfast.ops import host
torch.set_num_threads(2)
x = torch.randn(512, 512)
expected = torch.nn.functional.gelu(x, approximate="tanh").numpy()
def right():  # compared in numpy: after a fork, torch would wait forever for its own threads
    return numpy.allclose(host.gelu(x).numpy(), expected, atol=1e-5)
def work(times=20):
    return all([right() for _ in range(times)])
"""


def python(code, timeout=60, **environment):
    command = [sys.executable, "-c", PREAMBLE + code]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_environment_chooses_the_instruction_set():
    assert python("assert right(); print(_C.isa())", DITFAST_ISA=_C.isas()[0]) == _C.isas()[0]


def test_defaults():
    """The best instruction set, torch's threads, and subnormals, which -ffast-math would disable."""
    code = "print(right(), _C.isa(), _C.thread_runtime(), (torch.tensor(1e-40) / 2).item() > 0)"
    runtime = "openmp" if sys.platform.startswith("linux") else "pool"
    assert python(code, DITFAST_ISA="").split() == ["True", _C.isas()[-1], runtime, "True"]


def test_an_unknown_instruction_set_is_rejected():
    code = "import ditfast._C"
    environment = {**os.environ, "DITFAST_ISA": "mmx"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    message = f"ImportError: DITFAST_ISA must be one of {', '.join(_C.isas())} on this CPU, got 'mmx'"
    assert done.stderr.splitlines()[-1] == message
    with pytest.raises(ValueError, match="DITFAST_ISA must be one of .*, got 'mmx'"):
        _C.use_isa("mmx")


def test_without_torch_the_pool_is_used():
    code = "from ditfast import _C; print(_C.thread_runtime())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "pool", done.stderr


FORK = """
assert work()
for _ in range(5):
    child = os.fork()
    if child == 0:
        ok = work() and _C.thread_runtime() == "pool"
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if work() else 1)
        os._exit(0 if ok and os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert work()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_processes_work():
    python(FORK)


THREADS = """
def run(i):
    torch.set_num_threads(1 + i % 3)
    results[i] = work()
def all_right():
    global results
    results = [False] * 8
    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    return all(results)
assert all_right()
if hasattr(os, "fork"):  # the same on the pool
    child = os.fork()
    if child == 0:
        os._exit(0 if all_right() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def test_several_python_threads_work():
    python(THREADS)


REGIONS = """
import ctypes
for n in range(20):
    torch.set_num_threads(1 + n % 5)
    assert right()
torch.set_num_threads(2)
library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
results = []
body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: results.append(work()))
library.GOMP_parallel(body, None, ctypes.c_uint(2), ctypes.c_uint(0))
assert results == [True, True]
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs torch's OpenMP runtime")
def test_numbers_of_threads_change_and_regions_nest():
    """The number may change between calls, and torch's threads may already be in a parallel region."""
    python(REGIONS)


EXIT = """
out = torch.empty_like(x)
arguments = 0, *x.shape, x.data_ptr(), out.data_ptr(), 2
def forever():  # without torch, whose own calls may abort a process that is exiting
    while True: _C.gelu_forward(*arguments)
for _ in range(3): threading.Thread(target=forever, daemon=True).start()
work()
"""


def test_a_process_exits_while_threads_are_busy():
    python(EXIT)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and torch's OpenMP runtime")
def test_nothing_hangs_in_200_runs():
    for _ in range(200):
        python(FORK + THREADS + REGIONS + EXIT, timeout=180)
