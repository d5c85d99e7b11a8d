"""benchmarks/bench_ops.py and bench_attention.py: what they count, write, and refuse to print."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditfast import ops
from harness import problems, resuming
from harness.attention import command as bench_attention
from harness.attention import implementations
from harness.ops import command as bench_ops

pytest.importorskip("triton")
B, N, D = SHAPE = (64, 256, 1152)
U = B * N * D * 2  # a (B, N, D) tensor of 16 bits
SMALL = ["--quick", "--batch", "2", "--tokens", "4", "--dim", "72", "--dtypes", "fp32", "--repeats", "1"]
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered"), pytest.mark.usefixtures("one_thread")]


JUNCTION = "gated_residual_layer_norm_modulate"


def bytes_moved(name, mode, dtype, shape=SHAPE):
    return problems.Problem(name, *shape, dtype, "cpu").bytes_moved(mode)


@pytest.mark.parametrize(
    "op, mode, units",
    [
        ("layer_norm_modulate", "fwd", 2),
        ("layer_norm_modulate", "bwd", 3),
        ("gated_residual", "fwd", 3),
        ("gated_residual", "bwd", 3),
        (JUNCTION, "fwd", 4),
        (JUNCTION, "bwd", 6),
        ("gelu", "bwd", 12),
        ("gelu_recompute", "bwd", 16),
        ("attention", "fwd", 4),
        ("attention", "bwd", 8),
    ],
)
def test_bytes_in_units(op, mode, units):
    assert bytes_moved(op, mode, "bf16") == bytes_moved(op, mode, "fp16") == units * U
    assert bytes_moved(op, mode, "fp32") == 2 * units * U


@pytest.mark.parametrize(
    "op, mode, units",
    [
        ("layer_norm_modulate", "fwd", 2 + 1),  # x in fp32, h in bf16
        ("layer_norm_modulate", "bwd", 1 + 2 + 2),  # dh; x, dx
        ("gated_residual", "bwd", 2 + 1 + 1),  # dx; y, dy
        (JUNCTION, "fwd", 2 + 1 + 2 + 1),
        (JUNCTION, "bwd", 2 + 1 + 2 + 1 + 2 + 1),
    ],
)
def test_bytes_with_an_fp32_stream(op, mode, units):
    assert bytes_moved(op, mode, "autocast") == units * U


def test_bytes_of_images():
    image = B * 4 * 32 * 32 * 2
    assert bytes_moved("patchify", "fwd", "bf16") == 2 * image
    assert bytes_moved("unpatchify", "bwd", "bf16") == 2 * 2 * image
    assert bytes_moved("patch_embed", "fwd", "bf16") == image + U
    assert bytes_moved("patch_embed", "fwd", "autocast") == image + 2 * U


@pytest.mark.parametrize("op", ops.ALL, ids=lambda op: op.name)
def test_a_problem_names_the_operations_inputs_and_outputs(op):
    made = problems.Problem(op.name, 2, 4, 144, next(iter(op.backends["triton"])), "cpu")
    results = made.results("reference")
    leaves = dict(zip(made.input_names, made.inputs(), strict=True))
    assert set(op.parameters) <= set(leaves) or op is ops.ATTENTION
    assert set(op.outputs) <= set(results)
    for name, t in leaves.items():
        assert f"d{name}" not in results or results[f"d{name}"].shape == t.shape
    for names in op.moved.values():
        known = {*leaves, *op.outputs, "dact", "pre", "act"}
        assert {name if name in known else name.removeprefix("d") for name in names} <= known


def test_flops_of_attention():
    fwd, bwd, both = (bench_attention.executed_flops(mode, 2, 16, 3, 64) for mode in bench_attention.MODES)
    assert fwd == 4 * 2 * 3 * 16 * 16 * 64
    assert both == fwd + bwd


def test_quick_run(capsys, tmp_path):
    assert bench_ops.main([*SMALL, "--json", f"{tmp_path}/o.json", "--plot", f"{tmp_path}/o.png"]) == 0
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["schema"] == 1 and result["benchmark"] == "ops" and result["header"]["versions"]["torch"]
    names = set(bench_ops.OPS) - set(bench_ops.PRODUCTS)
    assert {c["op"] for c in result["cases"]} == names
    assert result["compiling"]["kernels"] >= len(names)
    for case in result["cases"]:
        assert case["error"] is None and case["parity"]["reason"] is None and case["parity"]["used"] <= 1
        if case["interpreted"]:
            assert case["ms"] is None and "gb_per_s" not in case
            continue
        times = [value for name, value in case["ms"].items() if name != "faults"]
        numbers = case["gb_per_s"], case["copy_gb_per_s"], case["copy_share"], *times
        assert all(math.isfinite(v) and v > 0 for v in numbers)
        assert case["gb_per_s"] == pytest.approx(case["bytes"] / case["ms"]["median"] / 1e6)
    assert (tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "of copy" in printed
    if not torch.cuda.is_available():
        assert "verified in Triton's interpreter, not timed" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="other kernels are timed on a GPU")
def test_the_kernels_of_the_cpu_are_timed(capsys, tmp_path):
    pytest.importorskip("ditfast._C")
    names = ["gated_residual", "gelu", "mlp", "attention", "qkv_attention"]
    sizes = [*SMALL[1:-4], "--dtypes", "bf16", "--repeats", "2", "--variants", "eager", "ditfast", "--ops", *names]
    assert bench_ops.main([*sizes, "--json", f"{tmp_path}/o.json"]) == 0
    cases = json.loads((tmp_path / "o.json").read_text())["cases"]
    assert {(c["op"], c["mode"]) for c in cases} == {(n, m) for n in names for m in ("fwd", "bwd")} - {
        ("gelu", "fwd")
    }
    for case in cases:
        assert case["backend"] == (None if case["variant"] == "eager" else "host")
        assert case["ms"]["faults"] >= 0 and case["speedup"]["eager"] > 0
        share = case["gemm_share"] if case["op"] in bench_ops.PRODUCTS else case["copy_share"]
        assert math.isfinite(share) and share > 0
    printed = capsys.readouterr().out
    assert "of GEMM: rate" in printed and "interpreter" not in printed


def test_flops_of_products():
    b, n, d = 2, 4, 72
    mlp, attention = (problems.Problem(name, b, n, d, "fp32", "cpu") for name in ("mlp", "attention"))
    assert (mlp.flops("fwd"), mlp.flops("bwd")) == (16 * b * n * d * d, 32 * b * n * d * d)
    assert (attention.flops("fwd"), attention.flops("bwd")) == (4 * b * n * n * d, 8 * b * n * n * d)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used without a GPU")
def test_the_command_chooses_the_interpreter(tmp_path):
    program = Path(__file__).parents[2] / "benchmarks" / "bench_ops.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(program), *SMALL, "--ops", "patchify"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "interpreter" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("mode, scale", [("fwd", 1.01), ("bwd", 0.99)])
def test_a_wrong_operation_gets_no_speed(monkeypatch, capsys, tmp_path, mode, scale):
    right = ops.gated_residual

    class Scaled(torch.autograd.Function):
        forward = staticmethod(lambda ctx, t: t * scale if mode == "fwd" else t.clone())
        backward = staticmethod(lambda ctx, grad: grad * scale if mode == "bwd" else grad)

    def wrong(*args, backend, **named):
        out = right(*args, backend=backend, **named)
        return out if backend == "reference" else Scaled.apply(out)

    changed = dataclasses.replace(ops.GATED_RESIDUAL, function=wrong)
    monkeypatch.setitem(problems.PROBLEMS, "gated_residual", changed)
    monkeypatch.setattr(bench_ops, "is_timed", lambda *_: True)  # so that only parity can withhold a speed
    assert bench_ops.main([*SMALL, "--ops", "gated_residual", "--json", f"{tmp_path}/o.json"]) == 1
    assert capsys.readouterr().out.count("parity FAILED") == 1
    for case in json.loads((tmp_path / "o.json").read_text())["cases"]:
        assert (case["ms"] is None) == (case["variant"] == "ditfast" and case["mode"] == mode)


def test_an_operation_that_raises_does_not_lose_the_others(monkeypatch, capsys):

    def fail(*args, backend, **named):
        if backend != "reference":
            raise RuntimeError("no such kernel")
        return ops.patchify(*args, backend=backend, **named)

    monkeypatch.setitem(problems.PROBLEMS, "patchify", dataclasses.replace(ops.PATCHIFY, function=fail))
    assert bench_ops.main([*SMALL, "--ops", "patchify", "unpatchify"]) == 1
    printed = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in printed and "1.00x" in printed


def test_a_deadline_is_kept_and_reported(monkeypatch, capsys):
    clock = iter((0.0, 0.5, 2.0))
    monkeypatch.setattr(resuming.time, "monotonic", lambda: next(clock))
    assert bench_ops.main([*SMALL, "--ops", "patchify", "unpatchify", "gated_residual", "--deadline", "1"]) == 0
    assert "deadline: 2 of 3 problems skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ops", "gated_residul"], "did you mean gated_residual"),
        (["--repeats", "0"], "--repeats: must be an integer >= 1, got '0'"),
        (["--json", "absent/o.json"], "--json: must be in an existing folder"),
    ],
)
def test_bad_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        bench_ops.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


ATTENTION = ["--quick", "--tokens", "16", "--head-dims", "72", "--total", "32", "--repeats", "1"]


def test_attention_quick_run(capsys, tmp_path):
    files = ["--json", f"{tmp_path}/a.json", "--plot", f"{tmp_path}/a.png"]
    assert bench_attention.main([*ATTENTION, *files]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert {case["mode"] for case in result["cases"]} == {"fwd", "bwd", "both"}
    for case in result["cases"]:
        if case["ms"]:
            assert case["tflops"] > 0 and case["floor_by"] in ("bytes", "math") and case["kernels"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "vs best peer" in capsys.readouterr().out


def test_wrong_attention_gets_no_speed(monkeypatch, tmp_path):

    def wrong(qkv, heads):
        return implementations._sdpa(qkv, heads) + 0.01 * (qkv - qkv.detach()).mean()  # right forward, wrong backward

    made = {"sdpa": implementations._sdpa, "ditfast-cuda": wrong}
    monkeypatch.setattr(bench_attention, "implementations", lambda device: made)
    assert bench_attention.main([*ATTENTION, "--json", f"{tmp_path}/a.json"]) == 1
    for case in json.loads((tmp_path / "a.json").read_text())["cases"]:
        assert (case["ms"] is None) == (case["variant"] == "ditfast-cuda" and case["mode"] != "fwd"), case
