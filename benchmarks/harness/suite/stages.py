"""The stages of gpu_suite.py: how to start each and read its output."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from harness.problems import PROBLEMS

BENCHMARKS = Path(__file__).parents[2]
ROOT = BENCHMARKS.parent


@dataclass(frozen=True)
class Stage:
    """One subprocess.

    Attributes:
        weight: its share of the time among the remaining stages, in seconds at the default deadline.
        command: (output file, seconds, is rehearsal) -> arguments.
        read: text of the output file -> (result, checks). A check says whether one kernel met the contract.
        folder: working directory.
    """

    name: str
    weight: float
    command: Callable[[Path, int, bool], list[str]]
    read: Callable[[str], tuple[dict, list[dict]]]
    folder: Path = ROOT


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
        return [sys.executable, "-m", "pytest", "-q", *plugins, *chosen]

    return command


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


PARITY = "tests/gpu/test_parity.py"
GPU_TESTS = ("tests/gpu", "tests/csrc/test_build.py", "tests/training/test_waiting.py")
BLOCK = ("--mode", "fwd_bwd", "fwd", "--variants", "eager", "ditfast", "compile", "ditfast+compile")
BATCH_OF_ONE = (  # a size for which wrong gradients from Inductor were reported
    "--batch",
    "1",
    "--blocks",
    "2",
    "--variants",
    "eager",
    "ditfast",
    "compile",
    "compile-no-mix-order",
)
STAGES = (  # most important first
    Stage("block", 170, _benchmark("bench_block.py", full=BLOCK), read_benchmark, BENCHMARKS),
    Stage("parity", 100, _pytest("-m", "gpu", PARITY, rehearsal=[PARITY]), read_tests),
    Stage("ops", 75, _benchmark("bench_ops.py"), read_benchmark, BENCHMARKS),
    Stage("attention", 45, _benchmark("bench_attention.py"), read_benchmark, BENCHMARKS),
    Stage("ceilings", 15, _benchmark("-m", "harness.ceilings", has_deadline=False), read_benchmark, BENCHMARKS),
    Stage(
        "tests",
        35,
        _pytest("-m", "gpu", *GPU_TESTS, f"--ignore={PARITY}", rehearsal=["tests/gpu", f"--ignore={PARITY}"]),
        read_tests,
    ),
    Stage("block-b1", 40, _benchmark("bench_block.py", full=BATCH_OF_ONE), read_benchmark, BENCHMARKS),
)
