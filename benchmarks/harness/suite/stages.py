"""The stages of gpu_suite.py: how each is started, and what its output says."""

import json
import sys
import xml.etree.ElementTree as ET
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
        weight: its share of the time, among the stages that are still to come.
        command: (output file, seconds, is rehearsal) -> arguments.
        read: output file -> (result, checks). A check says of one kernel whether it kept the contract.
        folder: where it is started.
    """

    name: str
    weight: float
    command: Callable[[Path, int, bool], list[str]]
    read: Callable[[Path], tuple[dict, list[dict]]]
    folder: Path = ROOT


def _benchmark(*program, full=(), has_deadline=False):
    def command(out, seconds, is_rehearsal):
        deadline = ["--deadline", str(max(1, int(0.8 * seconds)))] if has_deadline else []
        options = ["--quick"] if is_rehearsal else [*full, *deadline]
        return [sys.executable, *program, "--json", str(out), *options]

    return command


def _pytest(*full, rehearsal):
    def command(out, seconds, is_rehearsal):
        chosen = rehearsal if is_rehearsal else full
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out}", *chosen]

    return command


def read_json(path: Path):
    result = json.loads(path.read_text())
    return result, [_check(c) for c in result.get("cases", ()) if c.get("backend") and c["mode"] in ("fwd", "bwd")]


def _check(case):
    why = case["error"] or case["parity"]["reason"]
    found = {"op": PROBLEMS[case["op"]].name, "direction": case["mode"], "is_right": why is None, "why": why}
    return {k: case[k] for k in ("backend", "dtype")} | {"size": "x".join(map(str, case["shape"]))} | found


def read_junit(path: Path):
    counts, failures, checks = dict.fromkeys(("passed", "failed", "skipped"), 0), [], []
    for case in ET.parse(path).getroot().iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        is_skipped = case.find("skipped") is not None
        counts["failed" if bad is not None else "skipped" if is_skipped else "passed"] += 1
        why = None if bad is None else (bad.get("message") or "failed").splitlines()[0][:300]
        if bad is not None:
            failures.append({"test": f"{case.get('classname')}::{case.get('name')}", "why": why})
        properties = {p.get("name"): p.get("value") for p in case.iter("property")}
        if "direction" in properties and not is_skipped:
            checks.append(properties | {"is_right": bad is None, "why": why})
    return counts | {"failures": failures}, checks


PARITY = "tests/gpu/test_parity.py"
GPU_TESTS = ("tests/gpu", "tests/csrc/test_build.py", "tests/training/test_waiting.py")
STAGES = (
    Stage("ceilings", 0.05, _benchmark("-m", "harness.ceilings"), read_json, BENCHMARKS),
    Stage("parity", 0.22, _pytest("-m", "gpu", PARITY, rehearsal=[PARITY]), read_junit),
    Stage(
        "tests",
        0.18,
        _pytest("-m", "gpu", *GPU_TESTS, f"--ignore={PARITY}", rehearsal=["tests/gpu", f"--ignore={PARITY}"]),
        read_junit,
    ),
    Stage("ops", 0.20, _benchmark("bench_ops.py", has_deadline=True), read_json, BENCHMARKS),
    Stage("attention", 0.17, _benchmark("bench_attention.py", has_deadline=True), read_json, BENCHMARKS),
    Stage(
        "block",
        0.18,
        _benchmark("bench_block.py", full=("--variants", "eager", "compile", "ditfast", "ditfast+compile")),
        read_json,
        BENCHMARKS,
    ),
)
