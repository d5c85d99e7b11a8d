"""benchmarks/gpu_suite.py where processes crash, hang or lose their GPU: all other cases are still measured."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from harness import errors, resuming, sanitize
from harness.block import command as block
from harness.suite import command, digest, documents, execute, recorder
from harness.suite.stages import BENCHMARKS, STAGES, Stage, read_benchmark, read_tests

PROGRAM = """
import os, pathlib, signal, sys, time
out = pathlib.Path(sys.argv[2])
done = out.read_text().strip('"') if out.exists() else ""
assert bool(done) == ("--resume" in sys.argv)
out.write_text(f'"{done}."')
if len(done) == 0: os.kill(os.getpid(), signal.SIGSEGV)
if len(done) == 1: os._exit(86)
if len(done) == 2: time.sleep(600)
"""


@pytest.fixture
def suite(monkeypatch, tmp_path):
    def run(*stages):
        monkeypatch.setattr(command, "STAGES", stages)
        status = command.main(["--interpret", "--out", str(tmp_path)])
        (path,) = tmp_path.glob("*.json")
        return status, json.loads(path.read_text())["stages"]

    return run


def stage(code, patience=3, read=read_benchmark):
    def arguments(out, seconds, is_rehearsal):
        return [sys.executable, "-c", code, "--json", str(out)]

    return Stage("faulty", 1.0, arguments, read, patience=patience)


def test_a_benchmark_goes_on_in_a_new_process(suite, monkeypatch):
    monkeypatch.setattr(execute, "SLOWNESS", 1)
    status, (found,) = suite(stage(PROGRAM, read=lambda text: ({"processes": text}, [])))
    assert (status, found["status"], found["result"]) == (1, "red", {"processes": '"...."'})
    assert found["why"] == "ended by SIGSEGV; the GPU stopped answering; nothing new for 3 s"


def test_results_are_continued_behind_the_problem_that_ended_a_process(tmp_path):
    class Ended(BaseException):
        pass

    def cases_of(problem):
        if problem == 2:
            raise Ended
        if problem == 3:
            raise ValueError("too large")
        return [problem]

    names = {"one": 1, "two fp32": 2, "three": 3, "four": 4, "two bf16": 5}
    options = Namespace(json=tmp_path / "x", resume=False, deadline=None)
    with pytest.raises(Ended):
        resuming.measure_each(names, cases_of, {"notes": []}, options)
    written = json.loads(options.json.read_text())
    assert written["running"] == "two fp32" and written["cases"] == [1]
    options.resume, result = True, {"notes": ["new"]}
    resuming.measure_each(names, cases_of, result, options)
    assert (result["cases"], result["ended"], result["running"]) == ([1, 4], ["two fp32"], None)
    assert result["notes"] == ["new", "three skipped: ValueError: too large", "two fp32: its process ended"]


@pytest.mark.parametrize("patience, attempts", [(3, execute.ATTEMPTS), (None, 1)])
def test_a_stage_that_always_crashes_ends(suite, patience, attempts):
    _, (found,) = suite(stage("import os; os.abort()", patience))
    assert found["status"] == "red" and found["why"].count("ended by SIGABRT") == attempts


def test_a_block_goes_on_without_what_failed():
    def case(variant, error=None):
        return {"variant": variant, "error": error}

    def lost(*cases, running=None):
        before = {"cases": cases, "running": running, "backends": {"ditfast": {}, "ditfast+compile": {}}}
        return {c["variant"]: c["error"] for c in block.lost_cases(before, ["fwd", "fwd_bwd"])}

    ended = "its process ended"
    assert block.lost_cases({}, ["fwd"]) == []
    assert lost(case("eager"), running="ditfast") == {"ditfast": ended}
    assert lost(case("eager"), case("ditfast", "illegal"), running="compile") == {
        "ditfast": "illegal",
        "compile": ended,
    }
    assert lost(case("eager"), case("ditfast")) == {"ditfast": ended, "ditfast+compile": ended}  # while timing


@pytest.mark.slow
def test_bench_block_resumes(tmp_path, capsys):
    path = tmp_path / "block.json"
    path.write_text(json.dumps({"cases": [], "running": "ditfast", "backends": {"ditfast": {}}}))
    arguments = ["--quick", "--model", "DiT-S/8", "--mode", "fwd", "--json", str(path), "--resume"]
    assert block.main(arguments) == 1
    cases = {case["variant"]: case for case in json.loads(path.read_text())["cases"]}
    assert cases["ditfast"]["error"] == "its process ended" and cases["eager"]["ms"]
    assert "ditfast, forward, failed: its process ended" in capsys.readouterr().out


TESTS = """
import os, signal, time
import pytest

@pytest.fixture
def kernel(record_property):
    for key, value in {"op": "mlp", "backend": "triton", "direction": "bwd"}.items():
        record_property(key, value)

ENDING = pytest.mark.parametrize("name, backend", [("mlp", "triton")])
def test_one(kernel): pass
@ENDING
def test_two(kernel, name, backend): os.kill(os.getpid(), signal.SIGSEGV)
@ENDING
def test_three(kernel, name, backend): time.sleep(600)
@ENDING
def test_four(kernel, name, backend):
    from harness.suite import recorder
    recorder.gpu_is_lost = lambda: True
    raise ValueError("illegal memory access")
def test_five(kernel): pass
"""


def test_tests_go_on_in_a_new_process(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_a.py").write_text(TESTS)
    out, program = tmp_path / "out.json", [sys.executable, "-m", "pytest", "-p", "harness.suite.recorder"]
    options = ["--record", str(out), "--patience", "4", "-n", "1", "--max-worker-restart", "9", "test_a.py"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    subprocess.run([*program, *options], cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    result, checks = read_tests(out.read_text())
    ended = "its process ended, or it took more than 4 s"
    reasons = {re.search("test_([a-z]+)", f["test"].partition("::")[2])[1]: f["why"] for f in result["failures"]}
    assert reasons == {"two": ended, "three": ended, "four": "ValueError: illegal memory access"}
    assert [result[key] for key in ("passed", "failed", "skipped")] == [2, 3, 0]
    assert sorted((c["is_right"], c["why"] or "") for c in checks) == sorted(
        [(True, ""), (True, ""), *((False, why) for why in reasons.values())]
    )
    assert set(result["compiling"]) == {"kernels", "triton_s", "inductor_s"}
    worker = recorder.Worker(out, patience=4)
    with pytest.raises(pytest.skip.Exception, match="this kernel has ended 3 processes"):
        worker.pytest_runtest_setup(parametrized(name="mlp", backend="triton"))
    worker.pytest_runtest_setup(parametrized(name="mlp", backend="cuda"))
    plain = Namespace(user_properties=[])
    worker.pytest_runtest_setup(plain)
    assert plain.user_properties == [("kernel", [None, None])]


def parametrized(**params):
    return Namespace(callspec=Namespace(params=params), user_properties=[])


def test_a_digest_starts_with_what_failed():
    case = {
        "variant": "ditfast",
        "mode": "fwd",
        "shape": [1, 2],
        "dtype": "bf16",
        "error": None,
        "ms": {"median": 1.5},
    }
    case |= {"parity": {"reason": None}, "copy_share": 0.9}
    wrong = case | {"variant": "eager", "error": "too large", "ms": None}
    del wrong["copy_share"]
    result = {"passed": 1, "failed": 2, "skipped": 3, "notes": ["x" * 999], "cases": [case, wrong]}
    result["backends"] = {"ditfast": {"mlp": ["triton", "sdpa"]}}
    counts, reason, note, times, backends = digest.lines(result)
    assert backends == "ditfast ran mlp on triton + sdpa"
    assert (
        counts == "1 passed, 2 failed, 3 skipped" and reason == "eager, fwd, too large" and len(note) == digest.WIDTH
    )
    assert times == "fwd 1x2 bf16: ditfast 1500 us (90%), eager no time WRONG"
    many = {
        "failures": [{"test": str(i), "why": "no"} for i in range(50)],
        "cases": [case | {"op": i} for i in range(99)],
    }
    assert len(digest.lines(many)) == digest.LINES and digest.lines(many)[6] == "and 44 more failures"
    assert digest.lines(None) == []


def test_a_working_gpu_is_not_lost():
    assert not errors.gpu_is_lost()


def test_programs_that_resume_take_the_option():
    for each in STAGES:
        if each.patience:
            program = Path(each.folder, each.command(Path("x"), 9, True)[1]).name
            name = program.removeprefix("bench_").removesuffix(".py")
            folder = BENCHMARKS / "harness" / name
            assert any("resuming.add_option" in path.read_text() for path in folder.glob("*.py")), each.name


def test_documents_show_every_stage_with_times():
    without = {"parity", "tests", "sanitize", "alternatives"}
    assert {each.name for each in STAGES} - without == set(documents.SECTIONS)


def test_documents_leave_out_a_block_that_failed():
    work = {"model": "DiT-S/2", "blocks": 2, "batch": 8, "tokens": 256, "dtype": "bf16"}
    right = {"variant": "ditfast", "mode": "fwd", "ms": {"median": 2.5, "p10": 2, "p90": 3}, "tflops": 0.5}
    right |= {"gemm_share": 0.9, "error": None, "parity": {"reason": None}, "speedup": {"compile": 1.5}}
    wrong = block.lost_cases({"cases": [], "running": "eager"}, ["fwd"])
    *_, last = documents.SECTIONS["block"]({"workload": work, "cases": [*wrong, right]})
    assert last.startswith("| ditfast | fwd") and last.endswith("| 1.50x |")


def test_sanitizers_see_every_kernel():
    found = {(problem.op.name, backend) for problem, backend in sanitize.problems(False, "cuda")}
    assert {("attention", "cuda"), ("attention", "triton"), ("mlp", "triton"), ("unpatchify", "triton")} <= found


def test_alternatives_are_taken_and_given_back():
    """In the interpreter, with tiles and chunks that show in what the launchers ask for."""
    pytest.importorskip("triton")
    from harness import alternatives

    before = alternatives.rows.FORMS, alternatives.rows._chunk_size, alternatives.attention.tiles
    questions = {what: each for what, *each in alternatives.questions("cpu", is_quick=True)}
    problem, direction, choices = questions["attention forward"]
    cases = alternatives.compare(problem, direction, choices, "cpu")
    assert cases and all(case["ms"] and case["error"] is None for case in cases)
    assert (alternatives.rows.FORMS, alternatives.rows._chunk_size, alternatives.attention.tiles) == before
    for what, taken in (
        ("row", lambda rows: rows.FORMS[1152][0]),
        ("chunk", lambda rows: rows._chunk_size(1, 2, most=3)),
    ):
        _, _, choices = questions[f"layer_norm_modulate forward: {what}"]
        seen = []
        for _, context in choices:
            with context():
                seen.append(taken(alternatives.rows))
        assert len(set(seen)) == len(seen) > 1
