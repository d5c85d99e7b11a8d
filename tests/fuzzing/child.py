"""Run a case in its own process, forked from one that has everything loaded: its folder, its limits, its end."""

import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

from fuzzing.case import End, find_fault

CPU_SECONDS, SECONDS, MEMORY = 10, 60, 2 << 30  # wall time is longer on a busy machine


def run_case(make_case, folder: Path, show: bool = False) -> tuple[str, str, str | None]:
    """Run the result of ``make_case()`` in an empty ``folder``; return what it was, how it ended, and its fault."""
    folder.mkdir(parents=True)
    out, result = folder.with_suffix(".out"), folder.with_suffix(".json")
    pid = os.fork()
    if pid == 0:
        _run_child(make_case, folder, out, result)
    status = _wait(pid)
    printed = out.read_bytes().decode("utf-8", "replace") if out.exists() else ""
    found = result.read_text("utf-8", "surrogateescape").splitlines() if result.exists() else []
    shutil.rmtree(folder, ignore_errors=True)
    for path in (out, result):
        path.unlink(missing_ok=True)
    if show:
        print(printed)
    what = json.loads(found[0]) if found else "(the generator)"
    if status is None:
        return what, "hung", f"more than {SECONDS} s"
    if os.WIFSIGNALED(status):
        return (
            what,
            "killed",
            f"{signal.Signals(os.WTERMSIG(status)).name}, after {CPU_SECONDS} s of CPU time if SIGKILL",
        )
    if len(found) < 2:
        return what, "lost", f"the process exited\n{printed[-2000:]}"
    end, fault = json.loads(found[1])
    return what, end, fault


def _wait(pid):
    """The status of the process, or None if it had to be killed."""
    deadline, pause = time.monotonic() + SECONDS, 0.001
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _end_group(pid)  # leftover workers
            return status
        time.sleep(pause)
        pause = min(2 * pause, 0.02)
    _end_group(pid)
    os.waitpid(pid, 0)
    return None


def _end_group(pid):
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _run_child(make_case, folder, out, result):
    os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whatever the parent's handler is
    os.chdir(folder)
    file = os.open(out, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):  # Python's defaults
        setattr(sys, name, open(number, "w", encoding="utf-8", errors=errors, closefd=False))  # noqa: SIM115
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    spent = int(time.process_time()) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (spent, spent))  # the kernel's SIGKILL, which cannot be handled
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    code = 1
    try:
        with open(result, "w", encoding="utf-8") as file:
            case = make_case()
            print(json.dumps(case.what), file=file, flush=True)
            end = _end_of(case)
            sys.stdout.flush()
            printed = out.read_bytes().decode("utf-8", "replace")
            print(json.dumps([end.how, find_fault(case, end, printed)]), file=file, flush=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _end_of(case) -> End:
    try:
        case.run()
    except SystemExit as stop:
        if stop.code in (0, None):
            return End("accepted")
        if isinstance(stop.code, str):
            return End("refused", stop.code) if "\n" not in stop.code else End("crashed", f"two lines: {stop.code}")
        sys.stderr.flush()
        return End("refused", f"exit status {stop.code}")
    except BaseException as error:
        text = f"{type(error).__name__}: {error}"
        if not case.is_command and _is_refusal(error):
            return End("refused", text)
        return End("crashed", "".join(traceback.format_exception(error))[-3000:])
    return End("accepted")


def _is_refusal(error) -> bool:
    """Whether the package raises this exception for bad input."""
    from ditfast.data import DataError, Unreadable
    from ditfast.evaluation import EvaluationError
    from ditfast.sampling import SampleError
    from ditfast.training import TrainError

    own = (DataError, Unreadable, EvaluationError, SampleError, TrainError)
    usual = (ValueError, TypeError, IndexError, KeyError, OSError)
    chosen = isinstance(error, RuntimeError) and "cannot run" in str(error)  # a backend requested by name
    return isinstance(error, (*own, *usual)) or chosen
