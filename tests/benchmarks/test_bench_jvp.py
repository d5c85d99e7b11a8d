"""benchmarks/bench_jvp.py: what it prints and writes, and that it rejects a wrong result."""

import json

import pytest

from ditfast import ops
from ditfast.models.presets import SIZES
from harness.jvp import command

QUICK = ["--depth", "1", "--size", "8", "--batch", "2", "--repeats", "1", "--variants", "explicit", "ditfast"]


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    monkeypatch.setitem(SIZES, "S", {"depth": 2, "hidden_size": 64, "num_heads": 2})
    # such small blocks would not use the operations that tests replace
    monkeypatch.setattr("ditfast.ops.backends.on_cpu.is_below", lambda *_: False)


def test_each_variant_is_compared_and_timed(capsys, tmp_path):
    assert command.main([*QUICK, "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    for word in ("1 block, latents 8", "parity / budget", "ditfast (no kernel ran)"):  # on tensors as small as these
        assert word in printed
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert [(c["dtype"], c["variant"]) for c in cases] == [
        (d, v) for d in ("fp32", "bf16") for v in ("explicit", "ditfast")
    ]
    for case in cases:
        assert case["ms"]["median"] > 0 and case["parity"]["used"] <= 1
        assert case["speedup"]["explicit"] > 0


@pytest.mark.parametrize("of_tangents", (False, True))
def test_a_wrong_step_gets_no_speed(monkeypatch, capsys, tmp_path, of_tangents):
    right = ops.mlp

    def wrong(h, *args, **kwargs):
        out = right(h, *args, **kwargs)
        if kwargs["backend"] == ("reference", "auto"):
            return out
        return out + (out - out.detach()) * 0.05 if of_tangents else out * 1.05

    monkeypatch.setattr(ops, "mlp", wrong)
    assert command.main([*QUICK, "--dtypes", "fp32", "--json", str(tmp_path / "out.json")]) == 1
    assert "parity FAILED" in capsys.readouterr().out
    explicit, ours = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert explicit["ms"] and ours["ms"] is None


@pytest.mark.parametrize(
    ("options", "text"),
    (
        (["--depth", "0"], "--depth: must be an integer >= 1, got '0'"),
        (["--variants", "explict"], "got 'explict', did you mean explicit?"),
        (["--json", "none/out.json"], "--json: must be in an existing folder"),
    ),
)
def test_bad_arguments_are_one_line(options, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main([*QUICK, *options])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and text in said and len(said.splitlines()) == 1
