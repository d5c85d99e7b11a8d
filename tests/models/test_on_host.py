"""A block on the CPU's kernels after one check of everything: bit for bit what the operations compute one by one."""

import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode

from ditfast.models import DiTBlock, on_host
from ditfast.models.carry import set_pending, start_carry
from ditfast.ops.backends import choice, on_cpu
from ditfast.ops.backends.log import record

pytest.importorskip("ditfast._C")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def kernels_win(monkeypatch):
    monkeypatch.setattr(on_cpu, "takes_host", lambda *_: True)
    monkeypatch.setattr(on_cpu, "is_below", lambda *_: False)


@pytest.fixture
def taken(monkeypatch):
    """One entry for each block that was run so."""
    calls, run_block = [], on_host.run_block
    monkeypatch.setattr(on_host, "run_block", lambda *args: calls.append(1) or run_block(*args))
    return calls


def problem(kit, precision):
    """A block, a carry with a pending branch, one without, and precomputed modulation."""
    stream = torch.float32 if precision == "autocast" else precision
    branch = BF16 if precision == "autocast" else precision
    block = kit.fill(DiTBlock(32, 2)).to(branch)
    x, c = kit.arr("tokens", (2, 5, 32)).to(stream), kit.arr("c", (2, 32)).to(stream)
    y, gate, bias = (kit.arr(n, s).to(branch) for n, s in (("y", (2, 5, 32)), ("gate", (2, 32)), ("bias", (32,))))
    start = start_carry(x, c, ("auto",))
    return block, (start, set_pending(start, x, y, gate, bias)), kit.arr("rows", (2, 192)).to(branch)


def run(block, carry, rows):
    with record() as ran:
        done = block(carry, carry.silu_c) if rows is None else block.forward_rows(carry, rows)
    return done, ran


@torch.no_grad()
@pytest.mark.parametrize("precision", (BF16, torch.float32, torch.float16, "autocast"), ids=str)
def test_computes_the_same_bits(kit, taken, monkeypatch, precision):
    block, carries, given = problem(kit, precision)
    block.norm2.eps, block.attn.scale = 1e-3, 0.4
    with torch.autocast("cpu", BF16, enabled=precision == "autocast"):
        for carry in carries:
            for rows in (None, given):
                got, ran = run(block, carry, rows)
                assert taken.pop() == 1
                with monkeypatch.context() as m:
                    m.setattr(on_host, "takes_block", lambda *_: False)
                    expected, ran_before = run(block, carry, rows)
                assert ran == ran_before and ran["mlp"] == ["host"]
                for a, b in zip(got[:4], expected[:4], strict=True):
                    assert a.dtype == b.dtype and torch.equal(a, b)


def without_a_kernel(block, m):
    m.setattr(on_cpu, "takes_host", lambda op, *_: op.name != "attention")


def by_name(block, m):
    m.setattr(choice, "_environment", "reference")


def going_on(block, m):
    m.setattr(choice, "_repeated", {"mlp": "reference", "attention": "host"})


def in_two_dtypes(block, m):
    block.mlp.fc1.bias = nn.Parameter(block.mlp.fc1.bias.float())


def sparse(block, m):
    block.mlp.fc1.weight = nn.Parameter(block.mlp.fc1.weight.to_sparse())


def hooked(block, m):
    block.mlp.fc1.register_forward_hook(lambda *_: None)


def differentiated(block, m):
    torch.set_grad_enabled(True)


@torch.no_grad()
@pytest.mark.parametrize(
    "change", (without_a_kernel, by_name, going_on, in_two_dtypes, sparse, hooked, differentiated)
)
def test_what_is_not_as_usual_is_left_to_the_operations(kit, taken, monkeypatch, change):
    block, (carry, _), _ = problem(kit, BF16)
    change(block, monkeypatch)
    try:
        block(carry.x, torch.ones(2, 32, dtype=BF16))
    except TypeError as error:
        said = {in_two_dtypes: "b1 must have the dtype of h", sparse: "w1 must be a dense tensor"}
        assert said[change] in str(error)
    assert not taken


@torch.no_grad()
def test_what_watches_operations_sees_them(kit, taken):
    class Seen(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **kwargs or {})

    block, (carry, _), _ = problem(kit, BF16)
    with Seen():
        block(carry, carry.silu_c)
    with torch.profiler.profile() as profile:
        block(carry, carry.silu_c)
    with torch.autograd.forward_ad.dual_level():
        block(carry, carry.silu_c)
    assert not taken and "ditfast.attention.default" in Seen.names
    assert any(event.key.startswith("ditfast::") for event in profile.key_averages())
