"""Run a stage in a subprocess and report its results as they appear."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from harness.errors import error_line
from harness.suite.stages import BENCHMARKS, ROOT

REHEARSAL = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
GRACE = 8  # seconds between SIGINT and SIGKILL
POLL = 2  # seconds between reads of the output
TAIL = 20  # lines to keep of a red stage's output


def run_stage(stage, seconds: float, is_rehearsal: bool, folder: Path, save, golden: Path):
    """Call ``save(found, checks)`` every few seconds, and at the end.

    Args:
        folder: receives the stage's output.
        golden: where its tests write golden values of this machine.
    """
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = {"name": stage.name, "date": now, "status": "skipped", "seconds": 0.0, "why": "no time left"}
    found |= {"result": None, "tail": []}
    if seconds < 1:
        return save(found, [])
    start, out, log = time.monotonic(), folder / "out", folder / "log"
    grace = min(GRACE, seconds / 4)

    def look(status, why):
        found.update(status=status, why=why, seconds=round(time.monotonic() - start, 1))
        checks = _read(stage, out, found)
        found["tail"] = [] if found["status"] in ("green", "running") else _tail(log)
        save(found, checks)

    command = stage.command(out, int(seconds - grace), is_rehearsal)
    environment = _environment(is_rehearsal, golden)
    try:
        code = _execute(
            command, stage.folder, environment, seconds - grace, grace, log, lambda: look("running", None)
        )
    except KeyboardInterrupt:
        look("killed", "interrupted")
        raise
    if code is None:
        look("killed", f"did not end within {seconds - grace:.0f} s")
    else:
        look("red", f"exit status {code}") if code else look("green", None)


def _environment(is_rehearsal, golden):
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]  # pytest's plugin is in harness
    found = {"DITFAST_GOLDEN_DIR": str(golden)} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return found | (REHEARSAL if is_rehearsal else {})


def _read(stage, out, found):
    """Fill in what has been written of the result; return the checks."""
    if found["status"] == "running" and not out.exists():
        return []
    try:
        found["result"], checks = stage.read(_clean(out.read_text()))
        return checks
    except Exception as error:
        found["why"] = f"{found['why'] or 'no result'}; {error_line(error)}"
        found["status"] = "red" if found["status"] == "green" else found["status"]
        return []


def _execute(command, cwd, environment, seconds, grace, log, look) -> int | None:
    """Returns the exit status, or None if it had to be stopped. Leaves no subprocess behind."""
    end = time.monotonic() + seconds
    with log.open("w") as output:
        options = {"cwd": cwd, "env": environment, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, start_new_session=True, **options)
        try:
            while (left := end - time.monotonic()) > 0:
                with suppress(subprocess.TimeoutExpired):
                    return process.wait(min(POLL, left))
                look()
            _signal(process, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            return None
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process, kind):
    with suppress(ProcessLookupError):  # all have exited
        os.killpg(process.pid, kind)


def _tail(log):
    return [line[:300] for line in _clean(log.read_text(errors="replace")).splitlines()[-TAIL:]]


def _clean(text):
    """Remove this machine's folder names."""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")
