"""benchmarks/gpu_suite.py: every stage is recorded, whatever happens in it, and the documents show the results."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.problems import gpu_kernels
from harness.suite import command, documents, readme
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


def synthetic(gpu="NVIDIA X", date="2026-01-02T03:04:05+00:00", **changes):
    """A run in which one kernel was right at one size and wrong at another, and one kernel was right."""
    check = {"stage": "tests", "op": "mlp", "backend": "triton", "dtype": "bf16", "direction": "bwd", "why": None}
    wrong = check | {"size": "2x2x2", "is_right": False, "why": "dh: 2 > 1"}
    ms = {"median": 0.5, "p10": 0.4, "p90": 0.6, "repeats": 3}
    case = {
        "op": "gated_residual_layer_norm_modulate",
        "mode": "fwd",
        "dtype": "bf16",
        "shape": [64, 256, 1152],
        "variant": "ditfast",
        "ms": ms,
        "bytes": 10**8,
        "gb_per_s": 200.0,
        "copy_gb_per_s": 250.0,
        "copy_share": 0.8,
        "speedup": {"eager": 2.5, "compile": 1.25},
    }
    header = {"machine": {"gpu": gpu}, "gpu_state": None, "versions": {"torch": "2", "triton": "3"}, "date": date}
    return {
        "schema": 1,
        "benchmark": "gpu_suite",
        "interpreted": False,
        "header": header | {"commit": "abcdef1234"},
        "stages": [{"name": "ops", "status": "green", "result": {"header": header, "cases": [case]}}],
        "checks": [
            check | {"size": "1x1x1", "is_right": True},
            wrong,
            {**wrong, "direction": "fwd", "is_right": True},
        ],
    } | changes


@pytest.fixture
def generated(tmp_path):
    def generate(*runs):
        folder = tmp_path / "results" / "gpu"
        folder.mkdir(parents=True)
        for i, run in enumerate(runs):
            (folder / f"{i}.json").write_text(json.dumps(run))
        documents.generate(tmp_path / "results", tmp_path / "docs")
        return [(tmp_path / "docs" / name).read_text() for name in ("verification.md", "performance.md")]

    return generate


def row(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(start)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_documents_of_a_run(generated, tmp_path):
    verification, performance = generated(synthetic())
    cells = row(verification, "| `mlp` | triton | bf16")
    assert cells[3] == "verified: NVIDIA X, 2026-01-02, abcdef1234"
    assert cells[4] == "**WRONG**: NVIDIA X, 2026-01-02, abcdef1234: 2x2x2 dh: 2 > 1"
    assert verification.count("unverified") == 2 * (len(gpu_kernels()) - 1)
    speed = row(performance, "| gated_residual_layer_norm_modulate | fwd")[3:]
    assert speed == ["bf16", "500.0", "200 GB/s", "80%", "2.50x", "1.25x"]
    assert "![ops on NVIDIA X](img/NVIDIA-X-ops.png)" in performance
    assert (tmp_path / "docs" / "img" / "NVIDIA-X-ops.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_over_its_error_budget_is_marked():
    case = {"variant": "sdpa", "mode": "fwd", "dtype": "bf16", "shape": [1, 64, 72], "head_dim": 72, "error": None}
    case |= {"parity": {"reason": "out: max error"}, "ms": {"median": 0.5}, "vs_best_peer": 1.0}
    case |= {"tflops": 100.0, "floor_share": 0.5, "floor_by": "math"}
    right = case | {"parity": {"reason": None}}
    *_, wrong_row, right_row = documents.SECTIONS["attention"]({"cases": [case, right]})
    assert wrong_row.startswith("| sdpa (over its error budget) | fwd") and right_row.startswith("| sdpa | fwd")


def test_the_newest_run_of_each_gpu_counts(generated):
    newer = synthetic(date="2026-02-02T00:00:00+00:00")
    newer["checks"] = [c | {"is_right": True} for c in newer["checks"]]
    verification, _ = generated(newer, synthetic(), synthetic("NVIDIA Y"))
    cell = row(verification, "| `mlp` | triton | bf16")[4]
    assert cell.startswith("verified: NVIDIA X, 2026-02-02, abcdef1234<br>**WRONG**: NVIDIA Y, 2026-01-02")


def test_a_rehearsal_verifies_nothing(generated):
    verification, performance = generated(synthetic(interpreted=True))
    assert "Every kernel is unverified on hardware" in verification and "interpreter" in verification
    assert "No GPU has been measured yet" in performance
    assert "verified: " not in verification + performance


def test_blocks_on_a_cpu(tmp_path):
    folder = tmp_path / "X-Y"
    folder.mkdir()
    head = {"machine": {"cpu": "X Y", "threads": 2}, "isa": "x86_64_v4", "versions": {"torch": "2.13.0"}}
    head |= {"commit": "abcdef1234", "date": "2026-01-02T"}
    case = {
        "variant": "ditfast",
        "mode": "fwd",
        "ms": {"median": 2.5, "p10": 2.0, "p90": 3.0},
        "tflops": 0.5,
        "gemm_share": 0.9,
    }
    case |= {"speedup": {"eager": 1.25, "compile": 1.5}, "error": None, "parity": {"reason": None}}
    work = {"blocks": 1, "model": "DiT-S/2", "batch": 8, "tokens": 256, "dtype": "bf16"}
    (folder / "block-s2.json").write_text(json.dumps({"header": head, "workload": work, "cases": [case]}))
    (folder / "other.json").write_text("{}")
    share = {"gb_per_s": 12.3, "copy_share": 0.5, "op": "gelu", "shape": [1, 2, 8], "dtype": "bf16"}
    timed = {name: case[name] for name in ("variant", "mode", "ms", "speedup")}
    cases = [timed | share, timed | share | {"op": "mlp", "tflops": 0.25, "gemm_share": 0.75}]
    (folder / "ops-s2.json").write_text(json.dumps({"header": head, "cases": cases}))
    text = documents.performance([], documents.measured_on_cpus(tmp_path), tmp_path)
    assert text.count("## X Y, 2 threads, x86_64_v4\n") == 1  # for both benchmarks
    assert text.count("2026-01-02, commit abcdef1234, torch 2.13.0.\n") == 2
    assert "### Operations: `gelu`, `mlp`\n" in text
    assert "### 1 block of DiT-S/2, B=8, N=256, bf16" in text
    assert row(text, "| gelu | fwd")[4:] == ["2500.0", "12.3 GB/s", "50%", "1.25x", "1.50x"]
    assert row(text, "| mlp | fwd")[5:7] == ["0.25 TFLOP/s", "75%"]
    assert row(text, "| ditfast | fwd")[2:] == ["2.500", "2.000–3.000", "", "0.5", "90%", "1.25x", "1.50x"]


def test_models_on_a_cpu(tmp_path):
    folder = tmp_path / "X-Y"
    folder.mkdir()
    head = {"machine": {"cpu": "X Y", "threads": 2}, "commit": "abcdef1234", "date": "2026-01-02T"}
    ms = {"median": 250.0, "p10": 240.0, "p90": 260.0, "faults": 7.0}
    shared = {"ms": ms, "gemm_share": 0.9, "images_per_s": 16.0}
    shared |= {"error": None, "parity": {"reason": None}}
    cases = [
        {
            "variant": "ditfast",
            "mode": "guided",
            **shared,
            "speedup": {"eager": 1.25, "diffusers": 1.5},
            "pack_ms": 70.4,
        },
        {"variant": "ditfast", "mode": "train", **shared, "speedup": {"eager": 1.75}},
        {"variant": "compile", "mode": "train", **shared, "ms": None, "speedup": {}},
    ]
    work = {"model": "DiT-S/2", "image_size": 256, "batch": 4, "dtype": "bf16", "steps": 8}
    run = {"benchmark": "model", "header": head | {"versions": {"torch": "2.13.0"}}, "workload": work, "cases": cases}
    run["backends"] = {"ditfast": {"mlp": ["host", "reference"]}}
    (folder / "model-s2.json").write_text(json.dumps(run))
    text = documents.performance([], documents.measured_on_cpus(tmp_path), tmp_path)
    assert "### DiT-S/2, 256², B=4, bf16" in text and "in a run of 8" in text
    assert "packing weights (ditfast 70 ms)." in text
    times = ["250.0", "240.0–260.0", "7", "16", "90%"]
    assert row(text, "| ditfast | guided step")[2:] == [*times, "1.25x", "1.50x"]
    assert row(text, "| ditfast | training step")[2:] == [*times, "1.75x", ""]
    assert "| variant | step | ms | 10–90 % | page faults | images/s | of GEMM | vs eager | vs diffusers |" in text
    assert "| compile |" not in text
    run["backends"] = {"ditfast": {"mlp": ["reference"], "attention": ["sdpa"]}}
    (folder / "model-s2.json").write_text(json.dumps(run))
    text = documents.performance([], documents.measured_on_cpus(tmp_path), tmp_path)
    assert "| ditfast (no kernel ran) | guided step" in text


def test_the_committed_documents_are_up_to_date():
    results, docs = ROOT / "benchmarks" / "results", ROOT / "docs"
    runs, cpus = documents.load(results), documents.measured_on_cpus(results)
    assert (docs / "verification.md").read_text() == documents.verification(runs)
    assert (docs / "performance.md").read_text() == documents.performance(runs, cpus, docs / "img")
    text = (ROOT / "README.md").read_text()
    assert text == readme.updated(text, cpus["block"], cpus["model"])


def test_the_table_of_readme():
    def case(variant, ms, reason=None):
        ms = {"median": ms, "p90": 1.5 * ms}
        return {"variant": variant, "mode": "fwd_bwd", "ms": ms, "error": None, "parity": {"reason": reason}}

    def block(model, dtype, *cases):
        return {"workload": {"model": model, "batch": 8, "dtype": dtype}, "cases": cases}

    small = block("DiT-S/2", "autocast", case("eager", 2.0), case("compile", 1.0, "wrong"), case("ditfast", 0.5))
    large = block("DiT-B/2", "fp32", case("eager", 4.0), case("compile-max-autotune", 5.0), case("ditfast", 8.0))
    failed = block("DiT-L/2", "bf16", case("eager", 9.0) | {"ms": None})
    text = f"A\n{readme.START}old\n{readme.END}Z\n"
    step = block("DiT-S/2", "bf16", case("eager", 3.0), case("diffusers", 2.0), case("ditfast", 1.0), case("mine", 1))
    step["cases"] = [c | {"mode": "guided"} for c in step["cases"]]
    lines = readme.updated(text, [small, failed, large], [step]).splitlines()
    assert lines[0] == "A" and lines[-1] == "Z"
    assert lines[5:7] == [
        "| DiT-B/2, B = 8, fp32 | **4.0 ms** | | **5.0 ms** | 8.0 ms | | 0.50x |",
        "| DiT-S/2, B = 8, fp32 weights, bf16 autocast | 2.0 ms | 1.0 ms † | | **0.5 ms** | | 2.00x |",
    ]
    assert lines[10] == "| DiT-S/2, guided step, B = 8, bf16 | 3.0 ms | | | 2.0 ms | **1.0 ms** | | 2.00x |"
    with pytest.raises(ValueError, match="README must have a line <!-- generated"):
        readme.updated("A\n", [small], [])
