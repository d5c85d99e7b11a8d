"""benchmarks/bench_model.py: what it prints and counts, and that it rejects a wrong result."""

import json
import math
from copy import deepcopy

import pytest
import torch

from ditfast import ops
from ditfast.models import unfused
from ditfast.models.presets import SIZES
from harness import usage
from harness.model import command, report, tail
from harness.model.training import LR, make_step, make_weights
from harness.model.variants import build
from harness.model.workload import MODES, Workload, make_inputs, make_model

QUICK = ["--quick", "--variants", "eager", "ditfast", "--dtype", "fp32"]


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    monkeypatch.setitem(SIZES, "S", {"depth": 2, "hidden_size": 64, "num_heads": 2})


def test_every_mode_is_timed_and_compared_with_everything_installed(capsys, tmp_path):
    pytest.importorskip("diffusers")
    files = ("--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png"))
    assert (
        command.main(
            ["--quick", "--variants", "eager", "diffusers", "zentorch", "ditfast", "ditfast+diffusers", *files]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert all(len(line) <= 140 for line in printed.splitlines())
    for word in ("images/s", "guided step", "training step", "commit", "ditfast ran on", "zentorch is not installed"):
        assert word in printed
    result = json.loads((tmp_path / "out.json").read_text())
    wanted = {(v, m) for v in ("eager", "diffusers", "ditfast", "ditfast+diffusers") for m in MODES}
    wanted -= {("diffusers", "train"), ("ditfast+diffusers", "train")}
    assert {(c["variant"], c["mode"]) for c in result["cases"]} == wanted
    for case in result["cases"]:
        numbers = [case["tflops"], case["images_per_s"], case["gemm_share"], *case["speedup"].values()]
        assert all(math.isfinite(value) and value > 0 for value in numbers)
        assert case["parity"]["used"] <= 1 and case["ms"]["faults"] >= 0
        assert (case["pack_ms"] is not None) == (case["mode"] == "guided" and case["variant"] == "ditfast")
        assert case["images_per_s"] == pytest.approx(2e3 / case["ms"]["median"])
    assert all(result["ceiling"][mode]["tflops"] > 0 for mode in MODES)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_originals_dtype_is_a_baseline_for_inference(capsys, tmp_path):
    """It uses float32 copies of the model's weights, which do not change."""
    command_line = ["--quick", "--variants", "eager", "eager-fp32", "ditfast", "--json", str(tmp_path / "out.json")]
    assert command.main([*command_line, "--dtype", "bf16"]) == 0
    assert "vs\nfp32" in report.BASES.values() and "eager-fp32, training step, skipped" in capsys.readouterr().out
    cases = {(c["variant"], c["mode"]): c for c in json.loads((tmp_path / "out.json").read_text())["cases"]}
    assert {m for v, m in cases if v == "eager-fp32"} == {"fwd", "guided"}
    for mode in ("fwd", "guided"):
        assert cases["ditfast", mode]["speedup"]["eager-fp32"] > 0
    assert command.main([*command_line, "--dtype", "fp32", "--mode", "fwd"]) == 0
    assert "eager-fp32, forward, skipped: identical to eager" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_both_training_steps_do_the_same(dtype):
    workload = Workload("DiT-S/8", 64, 2, dtype, 1, "cpu")
    model, inputs = make_model(workload), make_inputs(workload)
    start, moved = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]).float(), []
    for variant in ("eager", "ditfast"):
        step = make_step(variant, model, workload)
        for _ in range(2):
            torch.manual_seed(0)  # of the noise
            step(*inputs)
        masters = step.masters if variant == "eager" else step.weights.masters.values()
        moved.append(torch.cat([value.flatten() for value in masters]))
        assert moved[-1].dtype == torch.float32 and not torch.equal(moved[-1], start)
    torch.testing.assert_close(*moved, rtol=0, atol=2 * 2 * LR)  # two steps, each at most the learning rate
    assert ((moved[0] - moved[1]).abs() < 0.2 * LR).float().mean() > 0.9


def test_fp32_copies_do_not_change_the_model():
    workload = Workload("DiT-S/8", 64, 2, "bf16", 1, "cpu")
    model, (x, t, y) = make_model(workload), make_inputs(workload)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = build("eager-fp32", model)(x, t, y)
    assert {p.dtype for p in model.parameters()} == {out.dtype} == {torch.bfloat16}
    exact = build("eager", deepcopy(model).float())(x.float(), t, y)
    torch.testing.assert_close(out, exact.to(torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_operation_gets_no_speed(monkeypatch, capsys, tmp_path, mode):
    right = unfused._norm_modulate  # what such a small model runs
    monkeypatch.setattr(unfused, "_norm_modulate", lambda *args: right(*args) * 1.01)
    assert command.main([*QUICK, "--mode", mode, "--json", str(tmp_path / "out.json")]) == 1
    assert "parity FAILED" in capsys.readouterr().out
    for case in json.loads((tmp_path / "out.json").read_text())["cases"]:
        assert (case["ms"] is None) == (case["variant"] == "ditfast")


def test_a_single_wrong_gradient_is_red(monkeypatch):
    right = ops.qkv_attention

    def wrong(h, *args, **kwargs):
        return right(h, *args, **kwargs) + 0.01 * (h - h.detach()).mean()

    monkeypatch.setattr(ops, "qkv_attention", wrong)
    with ops.use_backend("reference"):  # by name, so that small blocks call it too
        assert command.main([*QUICK, "--mode", "fwd"]) == 0
        assert command.main([*QUICK, "--mode", "train"]) == 1


def test_compare_judges_ditfast_and_rejects_another_workload(tmp_path, capsys):
    old = tmp_path / "old.json"
    assert command.main([*QUICK, "--mode", "fwd", "--json", str(old)]) == 0
    result = json.loads(old.read_text())
    for ms, status in ((1e5, 0), (1e-5, 1)):
        for case in result["cases"]:
            case["ms"]["median"] = ms
        old.write_text(json.dumps(result))
        judged = [*QUICK, "--mode", "fwd", "--compare", str(old), "--fail-below", "0.95"]
        assert command.main(judged) == status
    assert command.main([*QUICK, "--batch", "3", "--compare", str(old)]) == 2
    assert "the workload differs: batch was 2, is 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, text",
    [
        (["--image-size", "100"], "--image-size: must be a multiple of 64, got 100"),
        (["--steps", "51"], "--steps: must be at most 50, got 51"),
        (["--fail-below", "0.9"], "--fail-below: needs --compare, got 0.9 alone"),
        (["--variants", "eagre"], "got 'eagre', did you mean eager?"),
        (["--model", "DiT-M/2"], "got 'DiT-M/2', did you mean"),
        (["--compare", "none.json"], "--compare: must be a file written by --json, got 'none.json'"),
    ],
)
def test_bad_arguments_are_one_line(options, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([*QUICK, *options])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and text in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("block", (2**16, 100 * 2**20))
def test_memory_is_only_the_calls(block):
    """No matter what an earlier call allocated and freed, which malloc may have kept."""

    def take(size):
        return [bytearray(block) + b"x" for _ in range(size // block)]

    size = 100 * 2**20
    last = [take(2 * size)[-1] for _ in range(2)]  # the end of the heap is in use, the memory before it is free
    peak = usage.peak_bytes(lambda: take(size), "cpu")
    del last
    assert peak is None or 0.9 * size <= peak <= 2.2 * size


def test_flops_are_the_papers_for_each_mode():
    one = Workload("DiT-XL/2", 256, 1, "fp32", 1, "cpu")
    assert one.macs() / 1e9 == pytest.approx(118.6, rel=0.01)
    four = Workload("DiT-XL/2", 256, 4, "fp32", 1, "cpu")
    assert [four.flops(mode) / one.flops("fwd") for mode in ("fwd", "guided", "train")] == [4, 8, 12]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_parts_after_backward_are_timed_against_a_copy(dtype, capsys, tmp_path):
    out = tmp_path / "out.json"
    assert tail.main(["--model", "DiT-S/8", "--dtype", dtype, "--repeats", "1", "--json", str(out)]) == 0
    parts = {part["part"]: part for part in json.loads(out.read_text())["parts"]}
    casts = {"cast gradients", "cast weights"}
    assert parts.keys() == tail.BYTES.keys() - (casts if dtype == "fp32" else set())
    assert parts["copy"]["of_copy"] == 1 and all(part["of_copy"] > 0 for part in parts.values())
    assert parts["AdamW"]["bytes"] == (7 if dtype == "fp32" else 14) * parts["norm"]["bytes"]  # bf16 gradients
    assert capsys.readouterr().out.count("a copy's time") == len(parts)


@pytest.mark.parametrize("dtype", tail.DTYPES.values(), ids=str)
def test_a_part_moves_what_it_should(dtype):
    """Together, the parts are a step: each changes its own tensors."""
    is_low = dtype != torch.float32
    weights = make_weights(torch.nn.Linear(3, 2).to(dtype))
    parts = tail.make_parts(weights, is_low)

    def state():
        return [
            torch.cat([t.detach().float().flatten() for t in d.values()]).clone()
            for d in (weights.masters, weights.average, weights.params)
        ]

    def changed(part):
        before = state()
        parts[part]()
        return [not torch.equal(a, b) for a, b in zip(before, state(), strict=True)]

    assert changed("norm") == changed("copy") == [False] * 3
    weights.optimizer.param_groups[0]["lr"] = 0.5  # a step that bf16 weights show, whatever they are
    assert changed("AdamW") == [True, False, not is_low]
    assert changed("average") == [False, True, False]
    if is_low:
        assert changed("cast weights") == [False, False, True]
