"""The doctor reports no matter what is missing or broken."""

import json
import subprocess
import sys

import pytest

import ditfast
from ditfast import doctor


def run_without(*modules: str, broken: str = "", args: tuple = ("--json",)) -> str:
    """The doctor's output in an interpreter that cannot import these modules."""
    code = f"""
import runpy, sys
for name in {modules!r}:
    sys.modules[name] = None
{broken}
sys.argv = ["doctor", *{args!r}]
runpy.run_module("ditfast.doctor", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
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


def test_the_report_names_what_runs_and_why_the_rest_does_not():
    text = run_without(args=())
    found = json.loads(run_without())
    assert f"backends on {found['ops']['device']} tensors" in text
    for op, backends in found["ops"]["backends"].items():
        line = next(line for line in text.splitlines() if line.split()[:2] == [op, "runs"])
        for name, reason in backends.items():
            assert name in line if reason is None else reason in text


def test_without_torch():
    found = json.loads(run_without("torch"))
    assert found["torch"] == "missing (torch is not installed)"
    assert not found["gpu"]["usable"] and found["gpu"]["why_not"] == "torch is not installed"
    assert found["ops"]["backends"] is None and "torch" in found["ops"]["why_not"]
    text = run_without("torch", args=())
    assert "missing (torch is not installed)" in text and "ops unknown: torch is not installed" in text


def test_without_triton():
    found = json.loads(run_without("triton"))
    assert found["triton"] == "missing (triton is not installed)"
    assert found["ops"]["backends"]["layer_norm_modulate"]["reference"] is None
    assert "triton" in found["ops"]["backends"]["layer_norm_modulate"]["triton"]


def test_without_the_extension():
    found = json.loads(run_without("ditfast._C"))
    why = "ditfast._C is not installed"
    assert found["extension"] == {"build_config": None, "why_not": why, "gpu_code": why}
    assert found["ops"]["backends"]["attention"]["host"]
    assert "missing (ditfast._C is not installed)" in run_without("ditfast._C", args=())


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
