"""The automatic choice on the CPU: by the committed table and the self-check, never by time."""

import pytest
import torch
from ops.row_ops import Case

from ditfast import ops
from ditfast.ops.backends import choice, on_cpu, selfcheck
from ditfast.ops.backends.log import record

_C = pytest.importorskip("ditfast._C")
pytestmark = pytest.mark.usefixtures("one_thread", "small_table")
COMMITTED = on_cpu.FASTER_FROM


@pytest.fixture
def small_table(monkeypatch, tmp_path):
    """Pretend that every kernel is faster from 1000 elements on, only in bfloat16."""
    names = ("gated_residual", "layer_norm_modulate", "gated_residual_layer_norm_modulate", "mlp", "attention")
    table = {_C.isa(): {name: {"bf16": 1000} for name in names}}
    monkeypatch.setattr(on_cpu, "FASTER_FROM", table)
    monkeypatch.setattr(selfcheck, "SIZE", (2, 9))
    monkeypatch.setattr(selfcheck, "_answers", {})
    monkeypatch.setenv("DITFAST_CACHE_DIR", str(tmp_path))


def ran(function, *args, **named):
    with record() as log:
        function(*args, **named)
    return {name for names in log.values() for name in names}


def gated_residual(dtype, n):
    case = Case("gated_residual", dtype, b=1, n=n, d=40)
    return ran(case.call, *case.inputs(), backend=None)


def test_faster_from_a_size_on():
    assert gated_residual("bf16", 25) == {"host"}
    assert gated_residual("bf16", 24) == {"reference"}
    assert gated_residual("fp32", 100) == {"reference"}  # not in the table


def test_every_operation_asks():
    x, row = torch.randn(2, 25, 40).bfloat16(), torch.randn(2, 40).bfloat16()
    w = torch.randn(80, 40).bfloat16()
    assert ran(ops.layer_norm_modulate, x, row, row) == {"host"}
    assert ran(ops.gated_residual_layer_norm_modulate, x, x, row, row, row) == {"host"}
    assert ran(ops.mlp, x, w, w[:, 0], w.T, None) == {"host"}
    assert ran(ops.attention, torch.randn(2, 25, 120).bfloat16(), 1) == {"host"}
    assert ran(ops.attention, torch.randn(2, 2, 120).bfloat16(), 1) == {"sdpa"}


def test_every_instruction_set_has_its_own_table(isa):
    assert gated_residual("bf16", 100) == ({"host"} if isa in on_cpu.FASTER_FROM else {"reference"})


def test_products_in_bfloat16_stay_with_pytorch_where_it_has_amx(monkeypatch):
    x, w = torch.randn(2, 25, 40).bfloat16(), torch.randn(80, 40).bfloat16()
    for has_amx, expected in ((False, {"host"}), (True, {"reference", "sdpa"})):
        monkeypatch.setattr(_C, "has_amx", lambda has_amx=has_amx: has_amx)
        assert ran(ops.mlp, x, w, w[:, 0], w.T, None) | ran(ops.attention, x.repeat(1, 1, 3), 1) == expected
        assert gated_residual("bf16", 25) == {"host"}


def test_a_wrong_kernel_is_not_used(monkeypatch):
    from ditfast.ops import host

    right = host.gated_residual
    monkeypatch.setattr(host, "gated_residual", lambda *args: right(*args) * 1.5)
    with pytest.warns(RuntimeWarning, match="gated_residual/host bfloat16 bfloat16 40 failed its self-check"):
        assert gated_residual("bf16", 100) == {"reference"}


def test_a_name_overrides_the_table():
    case = Case("gated_residual", "bf16", b=1, n=100, d=40)
    assert ran(case.call, *case.inputs(), backend="reference") == {"reference"}
    with choice.use_backend("reference"):
        assert ran(case.call, *case.inputs(), backend=None) == {"reference"}


def test_backward_uses_forwards_backend():
    case = Case("gated_residual_layer_norm_modulate", "bf16", b=1, n=100, d=40)
    with record() as log:
        out = case.call(*case.inputs(), backend=None)
        torch.autograd.backward(out, case.weights())
    assert log == {"gated_residual_layer_norm_modulate": ["host", "host"]}


def test_under_compile_the_kernel_stays_intact():
    case = Case("gated_residual_layer_norm_modulate", "bf16", b=2, n=100, d=40)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda *a: case.call(*a, backend=None), fullgraph=True, backend=backend)
    got, expected = compiled(*case.inputs()), case.call(*case.inputs(), backend="host")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    calls = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.ditfast.gated_residual_layer_norm_modulate.default in calls


def test_the_committed_table_names_what_exists():
    known = {op.name: op for op in ops.ALL}
    assert COMMITTED
    for isa_table in COMMITTED.values():
        for name, sizes in isa_table.items():
            assert "host" in known[name].backends and set(sizes) <= set(known[name].backends["host"])


def test_tangents_use_it_too():
    x, row = torch.randn(2, 25, 40).bfloat16(), torch.randn(2, 40).bfloat16()
    tangent = torch.ones_like(x)

    def run():
        out, moved = torch.func.jvp(lambda x: ops.layer_norm_modulate(x, row, row), (x,), (tangent,))
        assert moved.shape == out.shape

    assert ran(run) == {"host"}


def test_a_trace_contains_pytorch_operations():
    x, row = torch.randn(2, 25, 40).bfloat16(), torch.randn(2, 40).bfloat16()
    assert ran(ops.layer_norm_modulate, x, row, row) == {"host"}
    traced = torch.jit.trace(ops.layer_norm_modulate, (x, row, row))
    assert "ditfast::" not in str(traced.graph)
    torch.testing.assert_close(traced(x, row, row), ops.layer_norm_modulate(x, row, row, backend="reference"))
