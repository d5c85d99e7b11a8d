"""benchmarks/gpu_suite.py: every stage is recorded, whatever happens in it, and the documents show the results."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from suite_record import synthetic

from harness.suite import command
from harness.suite.stages import BENCHMARKS, ROOT, STAGES, Stage, read_benchmark, read_tests

SLEEP = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(OUT, "w").write(str(child.pid))
child.wait()
"""


def stage(name, code, weight=1.0, read=read_benchmark):
    """A stage that runs ``code``; in it, OUT is the file to write."""

    def arguments(out, seconds, is_rehearsal):
        return [sys.executable, "-c", f"OUT = {str(out)!r}\n{code}"]

    return Stage(name, weight, arguments, read)


def is_gone(pid):
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().split()[2] == "Z"


@pytest.fixture
def suite(monkeypatch, tmp_path):
    def run(stages, *arguments):
        monkeypatch.setattr(command, "STAGES", tuple(stages))
        status = command.main(["--interpret", "--out", str(tmp_path), *arguments])
        (path,) = tmp_path.glob("*.json")
        return status, json.loads(path.read_text())

    return run


def test_a_hung_stage_is_killed_and_the_others_run(suite):
    start = time.monotonic()
    stages = [
        stage("hung", SLEEP, read=lambda text: ({"child": text}, [])),
        stage("quick", "open(OUT, 'w').write('{\"answer\": 42}')", weight=2),
    ]
    status, record = suite(stages, "--deadline", "9")
    assert time.monotonic() - start < 9
    hung, quick = record["stages"]
    assert status == 1 and hung["status"] == "killed" and "did not end within" in hung["why"]
    assert quick["status"] == "green" and quick["result"] == {"answer": 42}
    assert is_gone(hung["result"]["child"])


def test_a_killed_stages_output_is_kept(suite):
    written = json.dumps({"at": f"{ROOT}/x"})
    code = f"open(OUT, 'w').write({written!r})\nprint('half way', flush=True)\nimport time; time.sleep(600)"
    _, record = suite([stage("partial", code)], "--deadline", "4")
    (found,) = record["stages"]
    assert found["status"] == "killed" and found["result"] == {"at": "./x"} and found["tail"][0] == "half way"


def test_a_red_stage_keeps_the_end_of_its_output(suite):
    code = f"print('x' * 400); print('in {ROOT}/tests'); raise SystemExit(3)"
    status, record = suite([stage("red", code), stage("none", "")])
    red, none = record["stages"]
    assert status == 1 and (red["status"], red["tail"][-1]) == ("red", "in ./tests")
    assert red["why"].startswith("exit status 3") and len(red["tail"][0]) == 300
    assert none["status"] == "red" and none["why"].startswith("no result")


def test_a_stage_without_time_is_skipped(suite):
    _, record = suite([stage("first", "open(OUT, 'w').write('{}')", weight=0.0), stage("second", "")])
    assert record["stages"][0]["status"] == "skipped"


def test_the_record_is_complete_after_each_stage(suite, tmp_path):
    code = f"import glob, shutil; (path,) = glob.glob('{tmp_path}/*.json'); shutil.copy(path, OUT)"
    _, record = suite([stage("first", "open(OUT, 'w').write('{}')"), stage("second", code)], "--commit", "a" * 10)
    seen = record["stages"][1]["result"]
    assert [s["name"] for s in seen["stages"]] == ["first"]
    assert seen["header"]["commit"] == record["header"]["commit"] == "a" * 10 and seen["interpreted"]


def test_the_cheap_stages_end_green(suite):
    status, record = suite([s for s in STAGES if s.name in ("attention", "ceilings")])
    assert status == 0, record
    attention, ceilings = (s["result"] for s in record["stages"])
    assert len(ceilings["gemms"]) == 12 + 1 and ceilings["copies"]
    assert attention["header"]["commit"] == record["header"]["commit"]
    checks = {(c["op"], c["direction"], c["is_right"]) for c in record["checks"]}
    assert checks == {("attention", "fwd", True), ("attention", "bwd", True)}


TESTS = """
import pytest

@pytest.fixture
def kernel(record_property):
    facts = {"op": "mlp", "backend": "triton", "dtype": "bf16", "direction": "bwd", "size": "1x2x3"}
    for key, value in facts.items():
        record_property(key, value)

@pytest.fixture
def broken():
    raise OSError("no disk")

def test_one(kernel): pass
def test_two(kernel): pytest.fail("dh: too far\\nmore")
def test_three(kernel): pytest.skip("too large")
def test_four(): pass
def test_five(broken): pass
def test_six(): import os; os._exit(9)
"""


def test_every_test_is_recorded_before_the_next_one_ends_the_process(tmp_path):
    (tmp_path / "test_a.py").write_text(TESTS)
    out = tmp_path / "out.json"
    program = [sys.executable, "-m", "pytest", "-p", "harness.suite.recorder", "--record", str(out), "test_a.py"]
    subprocess.run(program, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(BENCHMARKS)}, capture_output=True)
    result, checks = read_tests(out.read_text())
    failures = [("test_a.py::test_two", "Failed: dh: too far"), ("test_a.py::test_five", "OSError: no disk")]
    assert [(f["test"], f["why"]) for f in result["failures"]] == failures
    assert [result[key] for key in ("passed", "failed", "skipped")] == [2, 2, 1]
    assert [(c["is_right"], c["why"]) for c in checks] == [(True, None), (False, "Failed: dh: too far")]
    assert checks[0]["op"] == "mlp" and checks[0]["size"] == "1x2x3"


SLOW_SUITE = """
import sys
from harness.suite import command
from harness.suite.stages import Stage, read_benchmark

WORK = "import json, os, sys, time; open(sys.argv[1], 'w').write(json.dumps({'pid': os.getpid()})); time.sleep(600)"
slow = Stage("slow", 1.0, lambda out, *rest: [sys.executable, "-c", WORK, str(out)], read_benchmark)
command.STAGES = (slow,)
sys.exit(command.main(["--interpret", "--out", sys.argv[1]]))
"""


def test_a_stages_output_is_kept_when_the_suite_is_killed(tmp_path):
    program = [sys.executable, "-c", SLOW_SUITE, str(tmp_path)]
    with subprocess.Popen(program, env={**os.environ, "PYTHONPATH": str(BENCHMARKS)}) as suite:
        end, found = time.monotonic() + 60, None
        while (found is None or found["result"] is None) and time.monotonic() < end:
            time.sleep(0.1)
            found = next((json.loads(path.read_text())["stages"][0] for path in tmp_path.glob("*.json")), None)
        suite.terminate()
    assert suite.returncode != 0 and found["status"] == "running"
    (path,) = tmp_path.glob("*.json")
    (found,) = json.loads(path.read_text())["stages"]
    assert (found["status"], found["why"]) == ("killed", "interrupted")
    assert is_gone(found["result"]["pid"])


def found_in(name, date, answer, **changes):
    result = None if answer is None else {"answer": answer}
    found = {"name": name, "date": date, "status": "green", "seconds": 1.0, "why": None, "result": result, "tail": []}
    return found | changes


def record_of(date, *stages):
    checks = [{"stage": stage["name"], "is_right": True, "why": stage["date"]} for stage in stages]
    return synthetic(date=date, stages=list(stages), checks=checks)


def test_a_merge_keeps_the_newest_result_of_every_stage(tmp_path):
    first = record_of("2026-01-02T01", found_in("block", "1", "old"), found_in("tests", "2", "kept"))
    second = record_of("2026-01-02T05", found_in("ceilings", "5", 1), found_in("block", "6", "new"))
    third = record_of(
        "2026-01-02T03", found_in("block", "3", "older"), found_in("tests", "4", None, status="skipped")
    )
    files = [tmp_path / f"{i}" for i in range(3)]
    for path, made in zip(files, (first, second, third), strict=True):
        path.write_text(json.dumps(made))
    assert command.main(["--merge", *map(str, files), "--out", str(tmp_path / "merged")]) == 0
    (path,) = (tmp_path / "merged").iterdir()
    merged = json.loads(path.read_text())
    found = {stage["name"]: stage["result"]["answer"] for stage in merged["stages"]}
    assert list(found.items()) == [("block", "new"), ("ceilings", 1), ("tests", "kept")]
    assert [(c["stage"], c["why"]) for c in merged["checks"]] == [("block", "6"), ("ceilings", "5"), ("tests", "2")]
    assert merged["header"]["date"] == "2026-01-02T05" and path.name == "2026-01-02-abcdef1234.json"


def test_a_second_run_keeps_the_stages_of_the_first(suite):
    stages = [stage(name, f"open(OUT, 'w').write('{{\"name\": \"{name}\"}}')") for name in ("first", "second")]
    suite(stages, "--stages", "first")
    status, record = suite(stages, "--stages", "second")
    assert status == 0 and [s["result"]["name"] for s in record["stages"]] == ["first", "second"]


@pytest.mark.parametrize("changes", [{"gpu": "NVIDIA Y"}, {"interpreted": True}])
def test_a_merge_of_different_machines_is_rejected(tmp_path, refusal_of, changes):
    files = [tmp_path / "a", tmp_path / "b"]
    for path, made in zip(files, (synthetic(), synthetic(**changes)), strict=True):
        path.write_text(json.dumps(made))
    refused = refusal_of(command.main)
    assert "--merge: must be of one commit on one machine" in refused(["--merge", *map(str, files)])
    files[0].write_text("{}")
    assert "--merge: must be files written by gpu_suite.py" in refused(["--merge", str(files[0])])


def test_golden_layouts_are_written_next_to_the_record(suite, tmp_path):
    code = "import os, pathlib; pathlib.Path(os.environ['DITFAST_GOLDEN_DIR'], 'layouts.txt').write_text('x')"
    suite([stage("tests", code)])
    assert (tmp_path / "layouts.txt").read_text() == "x"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--interpret", "--commit", "main"], "--commit: must be 7 to 40 hexadecimal digits, got 'main'"),
        (["--interpret", "--deadline", "0"], "--deadline: must be an integer >= 1"),
        (["--interpret", "--stages", "atention"], "did you mean attention"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
