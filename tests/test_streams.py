"""Writing to a standard stream never ends a command."""

import os
import subprocess
import sys

CODE = """
import sys
from ditfast.streams import lasting_streams
with lasting_streams():
    input()
    for stream in (sys.stdout, sys.stderr):
        for _ in range(3):
            print("x" * 100_000, file=stream, flush=True)
"""


def test_a_reader_that_closes_the_pipe():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", CODE], **pipes)
    process.stdout.close()
    process.stderr.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    assert process.wait(timeout=60) == 0  # not 120, which means that the rest could not be flushed at exit


def run(code, **environment):
    code = f"import sys\nfrom ditfast.streams import lasting_streams\n{code}"
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def test_a_name_that_cannot_be_encoded():
    done = run("with lasting_streams(): print('a\\udcff')", PYTHONIOENCODING="ascii:strict")
    assert (done.returncode, done.stdout) == (0, "a\\udcff\n")


def test_streams_closed_before_the_start():
    done = run("sys.stdout = sys.stderr = None\nwith lasting_streams(): sys.stderr.write('nobody')")
    assert (done.returncode, done.stderr) == (0, "")
