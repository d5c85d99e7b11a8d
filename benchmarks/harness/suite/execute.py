"""Run a stage in a subprocess and report its results as they appear."""

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from harness.errors import LOST, error_line
from harness.suite.stages import BENCHMARKS, ROOT, Stage

REHEARSAL = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
GRACE = 8  # seconds between SIGINT and SIGKILL
POLL = 2  # seconds between reads of the output
SLOWNESS = 8  # of the interpreter, at least, which a rehearsal waits for
ATTEMPTS = 4  # processes for one benchmark
TAIL = 20  # lines to keep of a red stage's output
CRASHED = "crashed"  # a state of processes: the GPU or the interpreter failed, but another process can continue


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
    start, log, crashes = time.monotonic(), folder / "log", []
    process = Process(stage, seconds, is_rehearsal, folder, golden)

    def look(status, *why):
        reasons = "; ".join([*crashes, *filter(None, why)]) or None
        found.update(status=status, why=reasons, seconds=round(time.monotonic() - start, 1))
        checks = _read(stage, process.out, found)
        found["tail"] = [] if found["status"] in ("green", "running") else _tail(log)
        save(found, checks)

    try:
        status, why = process.run(log, look)
        while status == CRASHED and stage.patience and len(crashes) < ATTEMPTS - 1:
            crashes.append(why)
            status, why = process.run(log, look, "--resume")
    except KeyboardInterrupt:
        look("killed", "interrupted")
        raise
    look("red" if status == CRASHED or crashes and status == "green" else status, why)


@dataclass
class Process:
    """How to start a stage, and when to stop it."""

    stage: Stage
    seconds: float
    is_rehearsal: bool
    folder: Path
    golden: Path

    def __post_init__(self):
        self.out, self.grace = self.folder / "out", min(GRACE, self.seconds / 4)
        self.end = time.monotonic() + self.seconds - self.grace

    def run(self, log: Path, look, *options) -> tuple[str, str | None]:
        """Run it and return (state, why); leaves no subprocess behind. ``look("running")`` is called now and then."""
        left = self.end - time.monotonic()
        command = [*self.stage.command(self.out, max(1, int(left)), self.is_rehearsal), *options]
        environment = _environment(self.is_rehearsal, self.golden)
        with log.open("a") as output:
            streams = {"stdout": output, "stderr": subprocess.STDOUT}
            process = subprocess.Popen(
                command, cwd=self.stage.folder, env=environment, start_new_session=True, **streams
            )
            try:
                return self._watch(process, time.time(), look)
            finally:
                _signal(process, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # the driver may need long to end a kernel
                    process.wait(GRACE)

    def _watch(self, process, start, look):
        patience = (self.stage.patience or 0) * (SLOWNESS if self.is_rehearsal else 1)
        while (left := self.end - time.monotonic()) > 0:
            with suppress(subprocess.TimeoutExpired):
                return _ending(process.wait(min(POLL, left)))
            look("running")
            written = self.out.stat().st_mtime if self.out.exists() else time.time()
            if patience and time.time() - max(start, written) > patience:
                return CRASHED, f"nothing new for {patience} s"
        _signal(process, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(self.grace)
        return "killed", f"did not end within {self.seconds - self.grace:.0f} s"


def _ending(code):
    """State of a process that ended by itself, and why."""
    if code < 0:
        return CRASHED, f"ended by {signal.Signals(-code).name}"
    if code == LOST:
        return CRASHED, "the GPU stopped answering"
    return ("red", f"exit status {code}") if code else ("green", None)


def _environment(is_rehearsal, golden):
    paths = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]  # pytest's plugin is in harness
    found = {"DITFAST_GOLDEN_DIR": str(golden)} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    found |= {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}  # the log shows where a process was killed
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


def _signal(process, kind):
    with suppress(ProcessLookupError):  # all have exited
        os.killpg(process.pid, kind)


def _tail(log):
    return [line[:300] for line in _clean(log.read_text(errors="replace")).splitlines()[-TAIL:]]


def _clean(text):
    """Remove this machine's folder names."""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")
