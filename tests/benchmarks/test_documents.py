"""benchmarks/harness/suite/documents.py and readme.py: what the documents and README say of results."""

import json

import pytest
from suite_record import synthetic

from harness.problems import gpu_kernels
from harness.suite import documents, readme
from harness.suite.stages import ROOT


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
