"""benchmarks/bench_block.py: what it prints and counts, and that it rejects a wrong result."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ditfast import ops
from ditfast.ops import gemm
from harness.block import command, interpreter, memory, variants
from harness.block.workload import Workload, make_blocks, make_inputs

COMMAND = Path(__file__).parents[2] / "benchmarks" / "bench_block.py"
QUICK = ["--quick", "--repeats", "1", "--batch", "2", "--dtype", "fp32"]  # the same on a GPU


@pytest.fixture
def bench(monkeypatch, one_thread):
    """Run the program in this process, without the subprocess that interprets kernels."""
    monkeypatch.setattr(command, "prove_kernels", lambda *args: None)
    # such small blocks would not use the operations that tests replace
    monkeypatch.setattr("ditfast.ops.backends.on_cpu.is_below", lambda *_: False)
    return command


def run_command(*arguments, python=(), **options):
    program = [sys.executable, *python, str(COMMAND), *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """One run as a user starts it: its output and the files it wrote."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = [*QUICK, "--json", "out.json", "--plot", "out.png"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as here, so that the two can be compared
    done = run_command(*arguments, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, folder


def test_quick_run_prints_one_table(quick):
    printed, folder = quick
    lines = [line.split() for line in printed.splitlines()]
    first = [words[0] for words in lines if words]
    assert first.count("eager") == first.count("GEMMs") == 2
    assert all(len(line) <= 140 for line in printed.splitlines())
    for word in ("TFLOP/s", "GMACs", "commit", "torch", "forward + backward", "ditfast ran on", "sdpa: attention"):
        assert word in printed
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")


def test_json_holds_every_number(quick):
    result = json.loads((quick[1] / "out.json").read_text())
    assert result["schema"] == 1
    assert {(c["variant"], c["mode"]) for c in result["cases"]} == {
        (variant, mode) for variant in ("eager", "ditfast") for mode in ("fwd", "fwd_bwd")
    }
    for case in result["cases"]:
        assert case["ms"].pop("faults", 0) >= 0
        numbers = [case["tflops"], case["gmacs"], case["gemm_share"], *case["ms"].values(), *case["speedup"].values()]
        assert all(math.isfinite(value) and value > 0 for value in numbers)
        assert case["ms"]["p10"] <= case["ms"]["median"] <= case["ms"]["p90"]
        assert case["parity"]["used"] <= 1
    assert all(ceiling["tflops"] > 0 for ceiling in result["ceiling"].values())
    assert result["header"]["machine"] and result["header"]["versions"]["torch"] == torch.__version__
    assert result["backends"]["ditfast"]["gated_residual_layer_norm_modulate"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used without a GPU")
def test_kernels_are_verified_in_the_interpreter(quick):
    pytest.importorskip("triton")
    kernels = json.loads((quick[1] / "out.json").read_text())["kernels"]
    assert kernels["error"] is None and kernels["parity"]["used"] <= 1
    assert kernels["backends"]["gated_residual_layer_norm_modulate"] == ["triton"]


def test_a_missing_package_is_one_line():
    done = run_command(python=["-S"])  # without the packages of the environment
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "bench_block.py needs the package torch, which is not installed: pip install -e '.[bench]'"
    ]


def test_a_wrong_operation_gets_no_speed(bench, monkeypatch, capsys, tmp_path):
    right = ops.gated_residual_layer_norm_modulate

    def wrong(*args, **kwargs):
        x, h = right(*args, **kwargs)
        return x, h * 1.01

    monkeypatch.setattr(ops, "gated_residual_layer_norm_modulate", wrong)
    assert bench.main([*QUICK, "--json", str(tmp_path / "out.json")]) == 1
    assert capsys.readouterr().out.count("parity FAILED") == 2
    for case in json.loads((tmp_path / "out.json").read_text())["cases"]:
        assert (case["ms"] is None) == (case["variant"] == "ditfast")


def test_a_single_wrong_gradient_is_red(bench, monkeypatch):
    right = ops.qkv_attention

    def wrong(h, *args, **kwargs):
        return right(h, *args, **kwargs) + 0.01 * (h - h.detach()).mean()

    monkeypatch.setattr(ops, "qkv_attention", wrong)
    assert bench.main([*QUICK, "--mode", "fwd"]) == 0
    assert bench.main([*QUICK, "--mode", "fwd_bwd"]) == 1


def test_a_variant_that_raises_does_not_lose_the_others(bench, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ops, "qkv_attention", fail)
    assert bench.main([*QUICK, "--mode", "fwd"]) == 1
    printed = capsys.readouterr().out
    assert "ditfast, forward, failed: RuntimeError: no such kernel" in printed and "1.00x" in printed


def test_a_variant_that_raises_while_timed_does_not_lose_the_others(bench, monkeypatch, tmp_path):
    right, calls = ops.qkv_attention, []

    def fail_later(*args, **kwargs):
        calls.append(None)
        if len(calls) > 2:  # two blocks compute and compare
            raise RuntimeError("out of memory\nmore")
        return right(*args, **kwargs)

    monkeypatch.setattr(ops, "qkv_attention", fail_later)
    assert bench.main([*QUICK, "--mode", "fwd", "--json", str(tmp_path / "out.json")]) == 1
    eager, ditfast = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert eager["ms"] and ditfast["ms"] is None and ditfast["error"] == "RuntimeError: out of memory"


def test_no_case_starts_after_the_deadline(bench, monkeypatch, tmp_path):
    """Variants without a compiler are checked and timed first, and every case is written as soon as it is known."""
    written, clock = [], iter([0.0, 0.5, 0.6, 2.0, 2.1])
    monkeypatch.setattr(command.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(
        command.jsonfile, "write", lambda path, result: written.append(json.loads(json.dumps(result)))
    )
    arguments = ["--mode", "fwd", "--variants", "compile", "eager", "ditfast", "--deadline", "1"]
    assert bench.main([*QUICK, *arguments]) == 0
    finished = [result for result in written if result["running"] is None]
    assert [[(c["variant"], bool(c["ms"])) for c in result["cases"]] for result in finished[:3]] == [
        [("eager", False)],
        [("eager", False), ("ditfast", False)],
        [("eager", True), ("ditfast", True)],
    ]
    assert written[-1]["notes"] == ["deadline: compile, forward, skipped"]


def test_packed_weights_run_only_forward(bench, tmp_path):
    if reason := variants.why_not(variants.PACKED):
        pytest.skip(reason)
    names, file = ["eager", "ditfast", variants.PACKED], tmp_path / "out.json"
    assert bench.main([*QUICK[:-1], "bf16", "--variants", *names, "--json", str(file)]) == 0
    modes = {(case["variant"], case["mode"]) for case in json.loads(file.read_text())["cases"]}
    assert modes == {*((name, "fwd") for name in names), *((name, "fwd_bwd") for name in names[:2])}
    assert not gemm._packs.own


def test_a_run_without_ditfast_is_green_only_if_ditfast_was_not_requested(bench, monkeypatch):
    monkeypatch.setattr(variants, "why_not", lambda name: "cannot" if name == "ditfast" else None)
    assert bench.main([*QUICK, "--mode", "fwd", "--variants", "eager"]) == 0
    assert bench.main([*QUICK, "--mode", "fwd", "--variants", "eager", "ditfast"]) == 1


@pytest.fixture
def edited(quick, tmp_path):
    """Write the quick run's JSON with changes."""

    def write(change):
        result = json.loads((quick[1] / "out.json").read_text())
        change(result)
        path = tmp_path / "old.json"
        path.write_text(json.dumps(result))
        return str(path)

    return write


def scale_times(result, eager, ditfast):
    for case in result["cases"]:
        case["ms"]["median"] *= {"eager": eager, "ditfast": ditfast}[case["variant"]]


@pytest.mark.parametrize("factor, status", [(1e3, 0), (1e-3, 1)])
def test_compare_judges_the_ratio(bench, edited, capsys, factor, status):
    old = edited(lambda result: scale_times(result, factor, factor))
    assert bench.main([*QUICK, "--mode", "fwd", "--compare", old, "--fail-below", "0.95"]) == status
    assert "old / new" in capsys.readouterr().out
    assert bench.main([*QUICK, "--mode", "fwd", "--compare", old]) == 0


def test_compare_judges_only_ditfast(bench, edited, capsys):
    judge = [*QUICK, "--mode", "fwd", "--fail-below", "0.95", "--compare"]
    assert bench.main([*judge, edited(lambda result: scale_times(result, 1e-3, 1e3))]) == 0
    assert "eager" in capsys.readouterr().out
    assert bench.main([*judge, edited(lambda result: scale_times(result, 1e3, 1e-3))]) == 1
    assert "1 of 1 cases of ditfast below 0.95" in capsys.readouterr().out
    without = edited(lambda result: result.update(cases=[c for c in result["cases"] if c["variant"] == "eager"]))
    assert bench.main([*judge, without]) == 1
    assert "no case of ditfast is in both measurements" in capsys.readouterr().out


def test_compare_rejects_another_machine_or_workload(bench, edited, capsys):
    old = edited(lambda result: result["header"]["machine"].update(cpu="another"))
    assert bench.main([*QUICK, "--compare", old]) == 2
    assert "the machine differs: cpu was another" in capsys.readouterr().err
    assert bench.main([*QUICK, "--batch", "3", "--compare", edited(lambda result: None)]) == 2
    assert "the workload differs: batch was 2, is 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "DiT-XL2"], "--model: must be one of .*'DiT-XL2', did you mean DiT-XL/2?"),
        (["--variants", "eagre"], "--variants: must be one of .*'eagre', did you mean eager?"),
        (["--batch", "0"], "--batch: must be an integer >= 1, got '0'"),
        (["--blocks", "x"], "--blocks: must be an integer >= 1, got 'x'"),
        (["--image-size", "100"], "--image-size: must be a multiple of 16, got 100"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--fail-below", "0.9"], "--fail-below: needs --compare, got 0.9 alone"),
        (["--fail-below", "-1", "--compare", "x"], "--fail-below: must be a number > 0, got '-1'"),
        (["--compare"], "--compare: expected one argument"),
        (["--compare", "absent.json"], "--compare: .*absent.json.* does not exist"),
        (["--compare", __file__], "--compare: .* is not valid JSON"),
        (["--json", "absent/out.json"], "--json: must be in an existing folder"),
        (["--official", "absent"], "--official: must be a checkout of the original with a models.py, got 'absent'"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(bench, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(bench, "run", None)
    with pytest.raises(SystemExit) as stopped:
        bench.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message.replace("?", "[?]"), error), error


def test_official_checkout_is_timed_too(bench, capsys, tmp_path):
    (tmp_path / "models.py").write_text("from harness.block.eager import EagerBlock as DiTBlock\n")
    assert bench.main([*QUICK, "--mode", "fwd", "--variants", "ditfast", "--official", str(tmp_path)]) == 0
    assert "official" in capsys.readouterr().out


def test_official_checkout_names_a_missing_package(bench, capsys, tmp_path):
    (tmp_path / "models.py").write_text("import not_there\n")
    with pytest.raises(SystemExit):
        bench.main(["--official", str(tmp_path)])
    assert "needs the package 'not_there', which is not installed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [
        ("raise AttributeError('no such thing')", "cannot be imported: AttributeError: no such thing"),
        ("import torch\nfrom torch import absent", "cannot be imported: ImportError: cannot import name 'absent'"),
        ("", "has no DiTBlock"),
    ],
)
def test_official_checkout_that_does_not_work_says_why(tmp_path, text, message):
    (tmp_path / "models.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        variants.load_official(str(tmp_path))


@pytest.mark.parametrize("compiler", ["", "absent-compiler -O2"])
def test_compile_needs_a_compiler(monkeypatch, compiler):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(variants.shutil, "which", lambda name: name if name == "g++" else None)
    reason = None if compiler == "" else "torch.compile needs a C++ compiler, and absent-compiler was not found"
    assert variants.why_not("compile") == reason and variants.why_not("eager") is None


@pytest.mark.parametrize(
    "program, message",
    [
        ("import time; time.sleep(60)", "not finished after 2 s"),
        ("print('hello')", "printed, instead of JSON, 'hello.n'"),
    ],
)
def test_an_interpreter_that_fails_says_why(monkeypatch, program, message):
    run = subprocess.run
    monkeypatch.setattr(interpreter, "SECONDS", 2)
    monkeypatch.setattr(interpreter.subprocess, "run", lambda args, **kw: run([sys.executable, "-c", program], **kw))
    assert re.search(message, interpreter.in_subprocess("fp32")["error"])


def test_kept_bytes_of_a_known_graph():
    x = torch.randn(4, 8, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(8, 8))

    def run(cast):
        h = (x * 2).exp().sin()  # keeps the input of sin, which is also exp's output: counted once
        return h @ weight.to(cast).to(h.dtype)  # keeps h; the cast weight is not an activation

    assert memory.kept_bytes(lambda: run(torch.float32), [weight]) == 2 * 4 * 8 * 4
    half = torch.nn.Parameter(weight.detach().half().float())
    weight = half
    assert memory.kept_bytes(lambda: run(torch.float16), [half]) == 2 * 4 * 8 * 4


@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
def test_flops_equal_the_flop_counters(mode):
    w = Workload("DiT-S/2", 64, batch=2, blocks=2, dtype="fp32", device="cpu")
    stack, inputs = variants.Stack(make_blocks(w)), make_inputs(w)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the fused one is not counted
        out = stack(*inputs[:2])
        if mode == "fwd_bwd":
            out.backward(inputs[2])
    assert w.flops(mode) == counter.get_total_flops()


def test_macs_equal_the_papers():
    w = Workload("DiT-XL/2", 256, batch=1, blocks=28, dtype="fp32", device="cpu")
    assert w.tokens == 256
    assert w.macs("fwd") / 1e9 == pytest.approx(118.64, rel=1e-3)
