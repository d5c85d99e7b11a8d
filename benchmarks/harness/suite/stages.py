"""The stages of gpu_suite.py: how to start each and read its output."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from harness.problems import PROBLEMS

BENCHMARKS = Path(__file__).parents[2]
ROOT = BENCHMARKS.parent


@dataclass(frozen=True)
class Stage:
    """One subprocess.

    Attributes:
        weight: its share of the time among the remaining stages, in seconds if there is enough for all.
        command: (output file, seconds, is rehearsal) -> arguments.
        read: text of the output file -> (result, checks). A check says whether one kernel met the contract.
        folder: working directory.
        patience: seconds without a new result after which it counts as hung. Its program takes --resume, to continue
            after that or a crash without what was under way. None if it cannot.
    """

    name: str
    weight: float
    command: Callable[[Path, int, bool], list[str]]
    read: Callable[[str], tuple[dict, list[dict]]]
    folder: Path = ROOT
    patience: int | None = None


def _benchmark(*program, full=(), has_deadline=True):
    def command(out, seconds, is_rehearsal):
        deadline = ["--deadline", str(max(1, int(0.8 * seconds)))] if has_deadline else []
        options = ["--quick"] if is_rehearsal else [*full, *deadline]
        return [sys.executable, *program, "--json", str(out), *options]

    return command


def _pytest(*full, rehearsal):
    def command(out, seconds, is_rehearsal):
        chosen = rehearsal if is_rehearsal else full
        plugins = "-p", "no:cacheprovider", "-p", "harness.suite.recorder", "--record", str(out)
        patience = "--patience", str(SLOWEST_TEST[is_rehearsal])
        return [sys.executable, "-m", "pytest", "-q", *plugins, *patience, *_workers(), *chosen]

    return command


def _workers():
    """Arguments for several processes, if pytest-xdist is installed: they compile kernels at the same time."""
    if find_spec("xdist") is None:
        return []
    count = max(1, min(WORKERS, (os.cpu_count() or 1) // 2))
    return ["--numprocesses", str(count), "--max-worker-restart", str(MOST_CRASHES)]


def read_benchmark(text: str):
    result = json.loads(text)
    return result, [_check(c) for c in result.get("cases", ()) if c.get("backend") and c["mode"] in ("fwd", "bwd")]


def _check(case):
    why = case["error"] or case["parity"]["reason"]
    found = {"op": PROBLEMS[case["op"]].name, "direction": case["mode"], "is_right": why is None, "why": why}
    return {k: case[k] for k in ("backend", "dtype")} | {"size": "x".join(map(str, case["shape"]))} | found


def read_tests(text: str):
    """Read a file that `harness.suite.recorder` wrote."""
    result = json.loads(text)
    return result, result.pop("checks")


WORKERS = 6  # pytest processes: the float64 references of as many must fit on the GPU
MOST_CRASHES = 40  # pytest processes to start in place of others
SLOWEST_TEST = {False: 45, True: 600}  # seconds, by whether it is a rehearsal
PARITY = "tests/gpu/test_parity.py"
GPU_TESTS = ("tests/gpu", "tests/csrc/test_build.py", "tests/training/test_waiting.py")
BLOCK = ("--mode", "fwd_bwd", "fwd", "--variants", "eager", "ditfast", "compile", "ditfast+compile")
TUNED = (
    "--mode",
    "fwd_bwd",
    "fwd",
    "--variants",
    "ditfast",
    "compile",
    "compile-no-mix-order",
    "compile-max-autotune",
)
BATCH_OF_ONE = ("--batch", "1", "--blocks", "2", "--variants", "eager", "ditfast", "compile", "compile-no-mix-order")
MODEL = ("--mode", "guided", "--batch", "1", "--repeats", "5", "--variants", "eager", "ditfast")
PROGRAM = {"read": read_benchmark, "folder": BENCHMARKS}
BLOCKS = PROGRAM | {"patience": 75}  # torch.compile may take 40 seconds
CASES = PROGRAM | {"patience": 40}
STAGES = (  # most important first; the first also compiles what the others run
    Stage("parity", 100, _pytest("-m", "gpu", PARITY, rehearsal=[PARITY]), read_tests),
    Stage("block", 110, _benchmark("bench_block.py", full=BLOCK), **BLOCKS),
    Stage("attention", 45, _benchmark("bench_attention.py"), **CASES),
    Stage("ops", 60, _benchmark("bench_ops.py"), **CASES),
    Stage("ceilings", 15, _benchmark("-m", "harness.ceilings", has_deadline=False), **PROGRAM),
    Stage(
        "tests",
        60,
        _pytest("-m", "gpu", *GPU_TESTS, f"--ignore={PARITY}", rehearsal=["tests/gpu", f"--ignore={PARITY}"]),
        read_tests,
    ),
    Stage("sanitize", 90, _benchmark("-m", "harness.sanitize"), **PROGRAM),
    Stage("alternatives", 35, _benchmark("-m", "harness.alternatives"), **PROGRAM),
    # at batch 1, wrong gradients from Inductor were reported
    Stage("block-b1", 35, _benchmark("bench_block.py", full=BATCH_OF_ONE), **BLOCKS),
    Stage("block-tuned", 90, _benchmark("bench_block.py", full=TUNED), **PROGRAM),
    Stage("model", 50, _benchmark("bench_model.py", full=MODEL, has_deadline=False), **PROGRAM),
)
