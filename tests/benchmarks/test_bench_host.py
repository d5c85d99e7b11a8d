"""benchmarks/bench_host.py: it says what it does while it does it, and compiles every size."""

import json

import pytest
import torch

from ditfast import ops

pytest.importorskip("ditfast._C")
import bench_host  # noqa: E402


@pytest.fixture(autouse=True)
def small(monkeypatch, one_thread):
    monkeypatch.setattr(bench_host, "SIZES", ((1, 16, 64), (2, 16, 64)))
    monkeypatch.setattr(bench_host, "SECONDS", 0.0)


def test_each_size_is_announced_and_printed(monkeypatch, capsys, tmp_path):
    out = str(tmp_path / "out.json")
    monkeypatch.setattr("sys.argv", ["bench_host.py", "--ops", "mlp", "--precisions", "bf16", "--json", out])
    bench_host.main()
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [f"{i}/2: mlp, bf16, B, N, D = ({i}, 16, 64)" for i in (1, 2)]
    lines = [line.split()[:4] for line in printed.out.splitlines()[:4]]
    assert lines == [["mlp", "bf16", str(n), mode] for n in (4096, 8192) for mode in ("inference", "training")]
    written = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(r["elements"], r["mode"]) for r in written] == [(int(n), mode) for _, _, n, mode in lines]


def test_every_size_is_compiled(monkeypatch):
    """PyTorch compiles one function eight times at most."""
    compiled, original = [], torch.compile

    def counting(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: original(function, backend=counting, **options))
    for tokens in range(16, 26):
        named = {"tokens": torch.randn(1, tokens, 16), "patch_size": 2, "grid": (1, tokens)}
        bench_host.compiled_run_of(ops.UNPATCHIFY, named, "reference", False, torch.no_grad)()
    assert len(compiled) == 10


def test_an_unknown_operation_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench_host.py", "--ops", "mpl"])
    with pytest.raises(SystemExit) as stopped:
        bench_host.main()
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "got 'mpl', did you mean mlp?" in said and len(said.splitlines()) == 1
