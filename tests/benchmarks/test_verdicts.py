"""The effect of a missed error budget: ditfast turns red, a baseline is marked."""

import json

import pytest
import torch

from ditfast.ops import contract
from harness import problems
from harness.attention import command as bench_attention
from harness.attention import implementations
from harness.block import command as bench_block
from harness.block import parity, variants
from harness.ops import command as bench_ops
from harness.report import variant_text
from harness.verdicts import is_excused, is_green

BLOCK = ["--quick", "--repeats", "1", "--batch", "2", "--dtype", "fp32"]  # the same on a GPU
PARITY = {"tensor", "error", "budget", "used", "reason"}
pytestmark = [pytest.mark.filterwarnings("ignore:overflow encountered"), pytest.mark.usefixtures("one_thread")]


class Scaled(torch.nn.Module):
    """``stack`` with gradients, and optionally the output, times a factor."""

    def __init__(self, stack, factor, is_output_wrong):
        super().__init__()
        self.stack, self.factor, self.is_output_wrong = stack, factor, is_output_wrong

    def parameters(self, recurse=True):
        return self.stack.parameters(recurse)

    def forward(self, x, c):
        out = self.stack(x, c)
        right = out if self.is_output_wrong else out / self.factor
        return right.detach() * self.factor + (out - out.detach()) * self.factor


@pytest.fixture
def run_block(monkeypatch, tmp_path):
    """Exit status and cases of bench_block.py if the results of some variants are off by a factor."""
    build = variants.build
    monkeypatch.setattr(bench_block, "prove_kernels", lambda *args: None)

    def run(*names, is_output_wrong=False, **factors):
        factors = {name.replace("_", "+"): factor for name, factor in factors.items()}

        def build_wrong(name, *args):  # nothing is compiled, which would be slow
            made = build(name.removesuffix("+compile").replace("compile", "eager"), *args)
            return Scaled(made, factors[name], is_output_wrong) if name in factors else made

        monkeypatch.setattr(variants, "build", build_wrong)
        status = bench_block.main([*BLOCK, "--variants", *names, "--json", f"{tmp_path}/out.json"])
        result = json.loads((tmp_path / "out.json").read_text())
        return status, {(case["variant"], case["mode"]): case for case in result["cases"]}, result["notes"]

    return run


@pytest.mark.parametrize("factor, is_green_there", [(1.0, True), (1.001, False)])
def test_a_baseline_over_budget_is_timed_and_marked(run_block, capsys, factor, is_green_there):
    status, cases, _ = run_block("eager", "compile", "ditfast", compile=factor)
    assert status == 0
    case = cases["compile", "fwd_bwd"]
    assert set(case["parity"]) == PARITY and is_green(case) == is_green_there
    assert case["ms"]["median"] > 0 and cases["ditfast", "fwd_bwd"]["speedup"]["compile"] > 0
    printed = capsys.readouterr().out
    assert ("over budget" in printed) == ("exceeds its error budget" in printed) == (not is_green_there)


def test_ditfast_over_budget_is_red_whatever_compile_does(run_block):
    status, cases, _ = run_block("eager", "compile", "ditfast", compile=1.001, ditfast=1.001)
    assert status == 1
    assert cases["ditfast", "fwd_bwd"]["ms"] is None and cases["compile", "fwd_bwd"]["ms"]


def test_ditfast_compile_is_excused_by_compile(run_block, capsys):
    status, cases, notes = run_block("ditfast+compile", "compile", compile=1.001, ditfast_compile=1.001)
    ours = cases["ditfast+compile", "fwd_bwd"]
    assert status == 0 and is_excused(ours) and ours["parity"]["used"] > 1 and ours["ms"]
    assert not is_green(cases["compile", "fwd_bwd"]) and "as compile" in capsys.readouterr().out
    (note,) = notes
    assert note.startswith("ditfast+compile, forward + backward: ") and note.endswith("the error is PyTorch's")


@pytest.mark.parametrize(
    "names, factors",
    [
        (("ditfast+compile",), {"ditfast_compile": 1.001}),  # nothing shows that the error is PyTorch's
        (("compile", "ditfast+compile"), {"ditfast_compile": 1.001}),
        (("compile", "ditfast+compile"), {"ditfast_compile": 1.003, "compile": 1.001}),
        (("eager", "ditfast+compile"), {"ditfast_compile": 1.001, "eager": 1.001}),
    ],
)
def test_ditfast_compile_is_not_excused(run_block, names, factors):
    status, cases, notes = run_block(*names, **factors)
    assert status == 1 and cases["ditfast+compile", "fwd_bwd"]["ms"] is None and not notes


def entry(tensor, used):
    return {
        "tensor": tensor,
        "error": used,
        "budget": 1.0,
        "used": used,
        "reason": f"{tensor}: max error" if used > 1 else None,
    }


def test_one_more_wrong_tensor_is_not_excused():
    plain = [entry("a", 2.0), entry("b", 0.9)]
    assert contract.worst(parity.excused([entry("a", 2.2), entry("b", 0.8)], plain))["reason"] is None
    worst = contract.worst(parity.excused([entry("a", 2.2), entry("b", 1.01)], plain))
    assert worst["tensor"] == "b" and worst["reason"]
    broken = entry("a", 2.2) | {"error": None, "budget": None, "used": None, "reason": "a: not finite everywhere"}
    assert contract.worst(parity.excused([broken, entry("b", 0.8)], plain)) == broken


def test_a_variant_that_returns_nan_is_wrong(run_block):
    status, cases, _ = run_block("eager", "ditfast", ditfast=float("nan"), is_output_wrong=True)
    assert status == 1
    for mode in ("fwd", "fwd_bwd"):
        assert cases["ditfast", mode]["parity"]["reason"].endswith("not finite everywhere")
        assert cases["ditfast", mode]["parity"]["used"] is None


def test_a_peer_over_budget_is_timed_and_marked(monkeypatch, capsys, tmp_path):
    sdpa = implementations._sdpa
    made = {"sdpa": lambda *args: 1.001 * sdpa(*args), "ditfast-cuda": sdpa}
    monkeypatch.setattr(bench_attention, "implementations", lambda device: made)
    arguments = ["--quick", "--tokens", "16", "--head-dims", "72", "--total", "32", "--repeats", "1"]
    assert bench_attention.main([*arguments, "--json", f"{tmp_path}/out.json"]) == 0
    for case in json.loads((tmp_path / "out.json").read_text())["cases"]:
        assert set(case["parity"]) == PARITY
        assert case["ms"] and is_green(case) == (case["variant"] != "sdpa")
    assert capsys.readouterr().out.count("over budget") == 3


def test_eager_over_budget_is_timed_and_marked(monkeypatch, capsys, tmp_path):
    call, calls = problems.Problem.call, []

    def wrong_once(self, *inputs, backend):
        """The first two calls, plain and float64, are right; after that, eager is wrong."""
        calls.append(backend)
        found = call(self, *inputs, backend=backend)
        return tuple(1.01 * t for t in found) if backend == "reference" and len(calls) > 2 else found

    monkeypatch.setattr(problems.Problem, "call", wrong_once)
    arguments = ["--quick", "--batch", "2", "--tokens", "4", "--dim", "72", "--dtypes", "fp32", "--repeats", "1"]
    arguments += ["--ops", "gated_residual", "--json", f"{tmp_path}/out.json"]
    assert bench_ops.main(arguments) == 0
    for case in json.loads((tmp_path / "out.json").read_text())["cases"]:
        assert set(case["parity"]) == PARITY and is_green(case) == (case["variant"] == "ditfast")
        assert case["ms"] or case["interpreted"]
    assert capsys.readouterr().out.count("over budget") == 2


@pytest.mark.parametrize(
    "ran, marked",
    [
        ({"mlp": ["reference"], "attention": ["sdpa"]}, True),
        ({}, True),  # compiled to PyTorch's own operations
        ({"mlp": ["reference", "host"]}, False),
        ({"attention": ["triton"]}, False),
    ],
)
def test_a_row_of_ditfast_without_a_kernel_says_so(ran, marked):
    case, backends = {"variant": "ditfast", "ms": {"median": 1.0}}, {"ditfast": ran}
    assert variant_text(case, backends) == "ditfast" + marked * " (no kernel ran)"
    assert variant_text(case | {"ms": None}, backends) == "ditfast"
    assert variant_text(case | {"variant": "eager"}, backends) == "eager"
