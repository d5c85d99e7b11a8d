"""The doctor reports no matter what is missing or broken."""

import json
import subprocess
import sys

import pytest

import ditfast
from ditfast import doctor, ops
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.log import record
from ditfast.ops.op import PRECISIONS, RandomTensors


def run_without(*modules: str, broken: str = "", args: tuple = ("--json",), status: int = 0) -> str:
    """The doctor's output in an interpreter where these modules cannot be imported."""
    code = f"""
import runpy, sys
for name in {modules!r}:
    sys.modules[name] = None
{broken}
sys.argv = ["doctor", *{args!r}]
runpy.run_module("ditfast.doctor", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout


def test_complete_report():
    found = json.loads(run_without())
    assert found["ditfast"] == ditfast.__version__
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    for module in ("torch", "numpy"):
        assert found[module] == str(__import__(module).__version__)
    backends = found["ops"]["backends"]
    assert backends["layer_norm_modulate"]["reference"] is None
    assert set(backends["attention"]) >= {"reference", "sdpa"}


def test_text_names_what_auto_takes_and_why_the_rest_does_not_run():
    text, found = run_without(args=()), json.loads(run_without())
    assert f"backends on {found['ops']['device']} tensors" in text
    reasons = set()
    for op, backends in found["ops"]["backends"].items():
        line = next(line for line in text.splitlines() if line.startswith(f"{op} "))
        assert found["ops"]["auto"][op] in line
        named = [name for name, reason in backends.items() if reason is None]
        assert line.split("  ")[-1].strip().split(", ") == named
        reasons |= {*backends.values()} - {None}
    assert all(text.count(reason) == 1 for reason in reasons)
    assert text.splitlines()[-1].startswith(("Ready on ", "Not ready for the GPU"))


@pytest.mark.skipif(on_cpu.isa() != "x86_64_v4_bf16" or on_cpu._has_amx(), reason="one row of the table")
def test_what_auto_takes_is_what_it_takes():
    for op in (op for op in ops.ALL if op.self_check):
        for precision in ("bf16", "fp32"):
            taken = precision in on_cpu.precisions(op)
            arguments = op.arguments(RandomTensors(PRECISIONS[precision], "cpu"), 2, 576, 768)
            with record() as log:
                op.function(**arguments)
            assert log[op.name] == (["host"] if taken else [op.fallback]), (op.name, precision)


def test_without_torch():
    found = json.loads(run_without("torch"))
    assert found["torch"] == "missing (torch is not installed)"
    assert not found["gpu"]["usable"] and found["gpu"]["why_not"] == "torch is not installed"
    assert found["ops"]["backends"] is None and "torch" in found["ops"]["why_not"]
    text = run_without("torch", args=())
    assert "missing (torch is not installed)" in text
    assert text.splitlines()[-1] == "Not ready: torch is not installed" and text.count("torch is not installed") == 2


def test_without_triton():
    found = json.loads(run_without("triton"))
    assert found["triton"] == "missing (triton is not installed)"
    assert found["ops"]["backends"]["layer_norm_modulate"]["reference"] is None
    assert "triton" in found["ops"]["backends"]["layer_norm_modulate"]["triton"]
    assert run_without("triton", args=()).count("triton is not installed") == 1


def test_without_the_extension(monkeypatch):
    found = json.loads(run_without("ditfast._C"))
    why = "ditfast._C is not installed"
    assert found["extension"] == {"build_config": None, "why_not": why, "gpu_code": why}
    assert found["ops"]["backends"]["attention"]["host"]
    text = run_without("ditfast._C", args=())
    assert text.count("ditfast._C") == 1 and "missing (ditfast._C is not installed)" in text
    if not found["gpu"]["usable"]:
        assert text.splitlines()[-1] == "Ready on cpu tensors, with plain PyTorch, since no kernel runs here"
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        text = run_without("ditfast._C", args=("--verify",), status=1)
        assert "; nothing was verified: " in text.splitlines()[-1]


def test_a_broken_module_is_named_and_the_report_continues():
    broken = "import types; sys.modules['torch'] = types.ModuleType('torch')"
    found = json.loads(run_without(broken=broken))
    assert found["torch"].startswith("missing (AttributeError: module 'torch' has no attribute '__version__'")
    assert found["numpy"] and found["ops"]["why_not"]


@pytest.mark.parametrize("error", [RuntimeError("no\nluck"), OSError("no luck"), ImportError("no luck")])
def test_a_failing_probe_reports_its_error(error):
    def fails(*_):
        raise error

    reason = doctor.ask_why_not(fails, "attention", "host", "cpu")
    assert reason == f"{type(error).__name__}: no" + ("" if "\n" in str(error) else " luck")


def test_gpus_of_the_driver_without_torch(monkeypatch):
    answer = "NVIDIA H200, 9.0, 143771 MiB, 570.1\nNVIDIA H200, 9.0, 143771 MiB, 570.1\n"
    monkeypatch.setattr(
        doctor.subprocess, "run", lambda *args, **_: subprocess.CompletedProcess(args, 0, stdout=answer)
    )
    monkeypatch.setitem(sys.modules, "torch", None)
    found = doctor.gpus()
    gpu = {"name": "NVIDIA H200", "capability": "9.0", "memory": "143771 MiB", "driver": "570.1"}
    assert found == {"usable": False, "devices": [gpu, gpu], "why_not": "torch is not installed"}
    rows = [line for line in doctor.as_text(doctor.report()).splitlines() if line.startswith("gpu")]
    assert len(rows) == 3 and "NVIDIA H200" in rows[0] and "not usable" in rows[2]


def test_attentions_choice_is_shown_with_its_times():
    from ditfast import doctor

    found = doctor.report()
    found["choices"] = {"attention bfloat16 72 N<=256": {"choice": "triton", "us": {"triton": 151.0, "sdpa": 203.5}}}
    line = doctor.as_text(found).splitlines()[-1]
    assert line.split() == ["attention", "bfloat16", "72", "N<=256", "triton", "triton", "151.0,", "sdpa", "203.5"]


def test_verify_and_json_exclude_each_other():
    done = subprocess.run(
        [sys.executable, "-m", "ditfast.doctor", "--json", "--verify"], capture_output=True, text=True, cwd="/"
    )
    assert done.returncode == 2 and "--verify" in done.stderr and not done.stdout


@pytest.mark.parametrize("terminal", [False, True])
def test_verify_says_how_far_it_is(monkeypatch, capsys, terminal):
    """Before the first check, and on a terminal after each."""
    from ditfast.ops import verify

    key = ("mlp", "host", "torch.float32", "torch.float32", 64)
    monkeypatch.setattr(verify, "kernels_to_check", lambda device: [key] * 2)
    results = [verify.Result(*key, None, 0.1, True), verify.Result(*key, "max error", 0.1, True)]
    monkeypatch.setattr(verify, "verify_in_subprocess", lambda: iter(results))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert doctor.verify("cpu") == "1 of 2 checks failed, and auto will not take what failed"
    said = capsys.readouterr()
    assert said.out.splitlines()[1] == "self-check of 2 kernels, which takes minutes"
    assert [line.split()[0] for line in said.out.splitlines()[2:]] == ["mlp/host"] * 2
    shown = [text.split(",")[0] for text in said.err.replace("\r", "").split("\x1b[K") if text]
    assert shown == [f"{n} of 2 checked" for n in range(3)] * terminal
