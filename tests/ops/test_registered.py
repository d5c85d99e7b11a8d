"""Registered operations called by name, as compiled graphs call them, do what their fakes promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ops.registered import available, on_formulas, registered_calls
from ops.test_bad_input import OPS
from torch.library import opcheck

from ditfast.ops.backends import availability
from ditfast.ops.registration import describe

pytestmark = pytest.mark.usefixtures("one_thread")
BACKENDS = ("host", "reference", pytest.param("triton", marks=pytest.mark.slow))  # the interpreter is slow


def dense(t):
    return t


def transposed(t):
    return t.mT.contiguous().mT if t.dim() > 1 else t


def batch_last(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def expanded(t):
    return t[:1].expand(t.shape)


def offset(t):
    """One element into wider memory."""
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), float("nan"), dtype=t.dtype)
    wide[..., 1 : 1 + t.shape[-1]] = t
    return wide[..., 1 : 1 + t.shape[-1]]


def changed(op, args, change):
    """The arguments, each changed unless it must be contiguous."""
    rules = describe(op).rules
    names = [argument.name for argument in op._schema.arguments]
    may_change = [isinstance(a, torch.Tensor) and "dense" not in rules[n] for n, a in zip(names, args, strict=True)]
    return [change(a) if may else a for a, may in zip(args, may_change, strict=True)]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, batch, name):
    for op, args in registered_calls(name, backend if backend != "reference" else available(name), batch).items():
        for layout in (dense, transposed, batch_last, expanded, offset):
            taken = on_formulas(op, args) if backend == "reference" else args
            opcheck(op, changed(op, taken, layout), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", OPS)
def test_formulas_in_float64(name):
    for op, args in registered_calls(name, available(name)).items():
        doubled = [
            a.double() if isinstance(a, torch.Tensor) else torch.float64 if isinstance(a, torch.dtype) else a
            for a in on_formulas(op, args)
        ]
        opcheck(op, doubled, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(not availability._installed["ditfast._C"], reason="the extension is not built")
def test_wrong_arguments_are_errors():
    """In a child, since a kernel that believed one would read or write memory that is not its own."""
    command = [sys.executable, "-X", "faulthandler", "-m", "ops.registered_fuzz", "host"]
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "DITFAST_SELFCHECK": "0"}
    environment.pop("TRITON_INTERPRET", None)
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr[-2000:]
    *wrong, last = child.stdout.splitlines()
    assert not wrong and last.startswith("tried")
