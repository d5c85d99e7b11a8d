"""Run the stages and record what they found: see gpu_suite.py."""

import os
import re
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from harness import jsonfile
from harness.arguments import Parser, count
from harness.machine import header
from harness.suite import documents
from harness.suite.stages import BENCHMARKS, ROOT, STAGES

REHEARSAL = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
GRACE = 8  # seconds between the request to stop and the end by force
TAIL = 20  # lines of a red stage's output that are kept


def parse(argv):
    parser = Parser(prog="gpu_suite.py", description="Verify and time everything on this machine's GPU.")
    add = parser.add_argument
    add("--deadline", type=count, default=480, metavar="SECONDS", help="for all stages together (default 480)")
    add("--commit", metavar="SHA", help="what is measured, where it is no git checkout")
    add("--out", type=Path, metavar="DIR", help="folder of the JSON (default benchmarks/results/<GPU>)")
    add("--interpret", action="store_true", help="rehearse without a GPU: tiny sizes, kernels in the interpreter")
    add("--docs", action="store_true", help="generate docs/verification.md and docs/performance.md, and stop")
    options = parser.parse_args(argv)
    if not (options.docs or options.interpret or torch.cuda.is_available()):
        parser.error("argument --interpret: must be given where there is no CUDA GPU")
    if options.commit and not re.fullmatch(r"[0-9a-f]{7,40}(\+dirty)?", options.commit):
        parser.error(f"argument --commit: must be 7 to 40 hexadecimal digits, got {options.commit!r}")
    return options


def place(options, head) -> Path:
    """The file of this run."""
    gpu = head["machine"].get("gpu", "").replace(" ", "-")
    folder = options.out or (BENCHMARKS / "results" / gpu if gpu else ROOT / "build" / "gpu_suite")
    folder.mkdir(parents=True, exist_ok=True)
    commit = (head["commit"] or "unknown").replace("+", "-")
    return folder / f"{head['date'][:10]}-{commit}.json"


def run(stages, options) -> dict:
    """All stages; the file is complete after each of them."""
    head = header("cpu" if options.interpret else "cuda")
    head["commit"] = options.commit or head["commit"]
    path = place(options, head)
    record = {"schema": 1, "benchmark": "gpu_suite", "interpreted": options.interpret, "header": head}
    record |= {"deadline": options.deadline, "stages": [], "checks": []}
    end = time.monotonic() + options.deadline
    for i, stage in enumerate(stages):
        share = stage.weight / sum(s.weight for s in stages[i:])
        with tempfile.TemporaryDirectory() as folder:
            found, checks = run_stage(stage, share * (end - time.monotonic()), options.interpret, Path(folder))
        if "header" in (found["result"] or {}):
            found["result"]["header"]["commit"] = head["commit"]
        record["stages"].append(found)
        record["checks"] += [{"stage": stage.name, **check} for check in checks]
        jsonfile.write(path, record)
        print(f"{stage.name:10} {found['status']:8} {found['seconds']:6.1f} s  {found['why'] or ''}", flush=True)
    print(path)
    return record


def run_stage(stage, seconds: float, is_rehearsal: bool, folder: Path):
    """What one stage found, as far as it came, and its checks."""
    found = {
        "name": stage.name,
        "status": "skipped",
        "seconds": 0.0,
        "why": "no time left",
        "result": None,
        "tail": [],
    }
    grace = min(GRACE, seconds / 4)
    if seconds < 1:
        return found, []
    start, out = time.monotonic(), folder / "out"
    command = stage.command(out, int(seconds - grace), is_rehearsal)
    code = _execute(command, stage.folder, REHEARSAL if is_rehearsal else {}, seconds - grace, grace, folder / "log")
    found["seconds"] = round(time.monotonic() - start, 1)
    found |= {
        None: {"status": "killed", "why": f"did not end within {seconds - grace:.0f} s"},
        0: {"status": "green", "why": None},
    }.get(code, {"status": "red", "why": f"exit status {code}"})
    checks = []
    try:
        out.write_text(_clean(out.read_text()))
        found["result"], checks = stage.read(out)
    except Exception as error:
        found["why"] = f"{found['why'] or 'no result'}; {type(error).__name__}"
        found["status"] = "red" if found["status"] == "green" else found["status"]
    if found["status"] != "green":
        found["tail"] = _tail(folder / "log")
    return found, checks


def _execute(command, cwd, env, seconds, grace, log) -> int | None:
    """Exit status; None if it had to be stopped. Nothing that it started is left behind."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **env},
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            _signal(process, signal.SIGINT)  # pytest writes its report
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            return None
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()


def _signal(process, kind):
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, kind)


def _tail(log):
    return [line[:300] for line in _clean(log.read_text(errors="replace")).splitlines()[-TAIL:]]


def _clean(text):
    """Without the names of this machine's folders."""
    return text.replace(str(ROOT), ".").replace(str(Path.home()), "~")


def main(argv=None) -> int:
    options = parse(argv)
    if options.docs:
        documents.generate(BENCHMARKS / "results", ROOT / "docs")
        return 0
    record = run(STAGES, options)
    return 0 if all(stage["status"] == "green" for stage in record["stages"]) else 1
