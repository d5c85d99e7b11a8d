"""Which backend an operation runs on, and what happens when it cannot."""

import json
import os
import re
import subprocess
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from ops.row_ops import INPUTS, Case
from torch.utils.checkpoint import checkpoint

from ditfast import DiT, ops
from ditfast.ops.backends import availability
from ditfast.ops.backends.choice import choose, names_in_force, use_backend
from ditfast.ops.backends.log import record

LATENTS = torch.zeros(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4])
HOST = pytest.mark.skipif(not availability._installed["ditfast._C"], reason="the extension is not built")


def attend(**kwargs):
    """The backend that attention used, on the CPU, where all three can run."""
    with record() as log:
        ops.attention(torch.randn(2, 5, 24), 2, **kwargs)
    (name,) = log["attention"]
    return name


def modulate(device, d=16, per_token=False, dtype=torch.float32, **kwargs):
    """The backend that layer_norm_modulate used."""
    x = torch.randn(2, 5, d, device=device, dtype=dtype)
    row = torch.randn_like(x) if per_token else torch.randn(2, d, device=device, dtype=dtype)
    with record() as log:
        ops.layer_norm_modulate(x, row, row, **kwargs)
    (name,) = log["layer_norm_modulate"]
    return name


def in_process(script, **environment):
    """The last line printed by a new process, parsed as JSON; the keywords are its environment."""
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **environment}, capture_output=True,
                          text=True)  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else done.stderr


# each line removes the previous winner
ORDER = """
import json, torch
from ditfast import DiT, ops
from ditfast.ops.backends.choice import names_in_force, use_backend
from ditfast.ops.backends.log import record

def attend(**kwargs):
    with record() as log:
        ops.attention(torch.randn(1, 3, 24), 2, **kwargs)
    return log["attention"]

seen = {}
with use_backend("host"), use_backend("sdpa"):
    seen["call"] = attend(backend="host")
    seen["model"] = attend(backend=names_in_force("host"))
    seen["inner context"] = attend(backend=names_in_force())
with use_backend("sdpa"):
    seen["outer context"] = attend()
seen["environment"] = attend()
with use_backend("host"), use_backend("auto"):
    seen["auto"] = attend()
print(json.dumps(seen))
"""


@HOST
def test_order():
    seen = in_process(ORDER, DITFAST_BACKEND="reference")
    assert seen == {
        "call": ["host"],
        "model": ["host"],
        "inner context": ["sdpa"],
        "outer context": ["sdpa"],
        "environment": ["reference"],
        "auto": ["sdpa"],
    }


def test_unknown_name_in_the_environment():
    assert in_process("import ditfast.ops; print(1)", DITFAST_BACKEND="cudnn") == 1
    error = in_process(
        "from ditfast.ops.backends.choice import names_in_force; names_in_force()", DITFAST_BACKEND="cudnn"
    )
    assert "ValueError: DITFAST_BACKEND must be one of auto, " in error and "got 'cudnn'" in error


@HOST
def test_contexts_nest_and_end():
    assert attend() == "sdpa"
    with use_backend("reference"):
        with use_backend("host"):
            assert attend() == "host"
        assert attend() == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("host"):
            raise ZeroDivisionError
        assert attend() == "reference"
    assert attend() == "sdpa"


def test_an_operation_uses_the_innermost_backend_it_has(device):
    with use_backend("reference"), use_backend("sdpa"):
        assert modulate(device) == "reference"
        assert attend() == "sdpa"
    with use_backend("triton"), use_backend("sdpa"):
        assert modulate(device) == "triton"


def test_auto_in_a_call_undoes_every_context():
    with use_backend("reference"):
        assert attend(backend="auto") == "sdpa"
        assert names_in_force() == ("reference", "auto")


def test_auto_takes_the_reference_on_the_cpu():
    """Triton's interpreter is for tests; nobody wants it by default."""
    assert modulate("cpu") == "reference"


@pytest.mark.parametrize("enter", (use_backend, names_in_force), ids=("context", "model"))
def test_unknown_name(enter):
    with pytest.raises(ValueError, match="backend must be one of auto, .*, got 'cudnn'"), enter("cudnn"):
        pass


@pytest.mark.parametrize("op", [op for op in ops.ALL if "sdpa" not in op.backends], ids=lambda op: op.name)
def test_a_backend_that_the_operation_lacks(op):
    """An error if the call names it; ignored if a model or a context does."""
    with pytest.raises(ValueError, match=f"backend of {op.name} must be one of auto, .*, got 'sdpa'"):
        choose(op, "sdpa", "cpu")
    with use_backend("sdpa"):
        assert choose(op, names_in_force(), "cpu") == choose(op, names_in_force("auto"), "cpu")


WITHOUT_INTERPRETER = """
import json, torch
from ditfast import DiT, ops

x, row = torch.randn(2, 5, 16), torch.randn(2, 16)
try:
    ops.layer_norm_modulate(x, row, row, backend="triton")
except RuntimeError as error:
    print(json.dumps(str(error)))
"""


def test_triton_on_the_cpu_needs_the_interpreter():
    reason = in_process(WITHOUT_INTERPRETER, TRITON_INTERPRET="0")
    assert reason == (
        "layer_norm_modulate: backend 'triton' cannot run: "
        "triton needs a CUDA tensor, or TRITON_INTERPRET=1, got a tensor on cpu"
    )


CANNOT = {
    "float64": (dict(dtype=torch.float64), "the kernels support float32, float16 and bfloat16, got torch.float64"),
    "width": (dict(d=12), "the kernels need D to be a multiple of 8, at most 8192, got 12"),
    "wide": (dict(d=8200), "the kernels need D to be a multiple of 8, at most 8192, got 8200"),
    "per token": (dict(per_token=True), r"modulation of shape \(B, N, D\), one row per token, has no kernel"),
}


@pytest.mark.parametrize(("arguments", "reason"), CANNOT.values(), ids=CANNOT)
def test_forced_kernel_says_why_it_cannot_run(arguments, reason, device):
    with pytest.raises(RuntimeError, match=f"layer_norm_modulate: backend 'triton' cannot run: {reason}"):
        modulate(device, backend="triton", **arguments)
    assert modulate(device, backend="reference", **arguments) == "reference"


@pytest.mark.parametrize("arguments", [arguments for arguments, _ in CANNOT.values()], ids=CANNOT)
def test_automatic_choice_falls_back_to_the_reference(arguments, device):
    assert modulate(device, **arguments) == "reference"


@pytest.mark.parametrize(
    ("qkv", "reason"),
    [
        (torch.zeros(1, 3, 24, dtype=torch.float64), "float32, float16, bfloat16, got torch.float64"),
        (torch.zeros(1, 3, 3 * 257), "head dims up to 256, got 257"),
        (torch.zeros(1, 3, 24, device="meta"), "host needs a CPU tensor, got a tensor on meta"),
    ],
    ids=("float64", "head dim", "device"),
)
def test_forced_host_says_why_it_cannot_run(qkv, reason, monkeypatch):
    monkeypatch.setitem(availability._installed, "ditfast._C", True)
    with pytest.raises(RuntimeError, match=f"attention: backend 'host' cannot run: .*{reason}"):
        ops.attention(qkv, 1, backend="host")


@pytest.mark.parametrize(
    ("op", "name", "missing", "reason"),
    [
        (ops.ATTENTION, "host", "ditfast._C", "the extension ditfast._C is not built"),
        (ops.LAYER_NORM_MODULATE, "triton", "triton", "triton is not installed"),
    ],
)
def test_what_is_not_installed(op, name, missing, reason, monkeypatch):
    monkeypatch.setitem(availability._installed, missing, False)
    with pytest.raises(RuntimeError, match=f"{op.name}: backend '{name}' cannot run: {reason}"):
        choose(op, name, "cpu")
    with use_backend(name), pytest.raises(RuntimeError, match=reason):  # a context does not fall back, either
        choose(op, None, "cpu")


def test_an_extension_that_does_not_load(monkeypatch):
    monkeypatch.setitem(availability._installed, "ditfast._C", True)
    monkeypatch.setitem(sys.modules, "ditfast._C", None)
    with pytest.raises(
        RuntimeError, match="attention: backend 'host' cannot run: the extension ditfast._C does not load"
    ):
        choose(ops.ATTENTION, "host", "cpu")


def test_an_extension_of_older_sources(monkeypatch):
    """As after ``git pull`` in an editable installation: an error if requested by name, else as if missing."""
    monkeypatch.setitem(availability._installed, "ditfast._C", True)
    monkeypatch.setitem(sys.modules, "ditfast._C", types.ModuleType("ditfast._C"))
    monkeypatch.setattr("ditfast._C", sys.modules["ditfast._C"], raising=False)
    with pytest.raises(RuntimeError, match="'host' cannot run: .* older than ditfast and lacks .*: rebuild it"):
        choose(ops.ATTENTION, "host", "cpu")
    with torch.no_grad():
        assert DiT(input_size=8, hidden_size=64, depth=1, num_heads=2)(*LATENTS).isfinite().all()


def test_every_extension_function_that_is_called_is_known():
    sources = [path.read_text(encoding="utf-8") for path in Path(ops.__file__).parent.rglob("*.py")]
    called = {
        name for text in sources for name in re.findall(r"(?:_extension\(\)|(?<!torch\.)\b_C)\.([a-z]\w+)\(", text)
    }
    assert called == set(availability.CALLED)


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("name", ("triton", "reference"))
def test_backward_uses_forwards_backend(op, name, device):
    case = Case(op, b=2, n=3, d=16, device=device)
    with record() as log:
        with use_backend(name):
            out = case.call(*case.inputs(), backend=None)
        with use_backend("reference" if name == "triton" else "triton"):
            sum(t.sum() for t in (out if isinstance(out, tuple) else (out,))).backward()
    # the reference's backward is PyTorch's own
    assert log == {op: [name, name] if name == "triton" else [name]}


@HOST
def test_backward_of_attention_uses_forwards_backend():
    qkv = torch.randn(2, 5, 24, requires_grad=True)
    with record() as log:
        with use_backend("host"):
            out = ops.attention(qkv, 2)
        out.sum().backward()
    assert log == {"attention": ["host", "host"]}


def test_records_nest():
    with record() as outer:
        attend()
        with record() as inner:
            ops.attention(torch.zeros(1, 2, 6), 1, backend="reference")
        ops.attention(torch.zeros(1, 2, 6), 1, backend="sdpa")
    assert inner == {"attention": ["reference"]} and outer == {"attention": ["sdpa"]}


def test_compiled_code_follows_the_context(device):
    """A graph compiled for one backend does not run under another."""
    case = Case("layer_norm_modulate", b=2, n=3, d=16, device=device)
    fn = torch.compile(lambda *a: case.call(*a, backend=None), fullgraph=True, backend="aot_eager")
    for name in ("reference", "triton", "reference", "triton"):
        with record() as log, use_backend(name), torch.no_grad():
            fn(*case.inputs())
        assert log == ({"layer_norm_modulate": ["triton"]} if name == "triton" else {})  # traced: nothing to record


MODULATION = ("shift", "scale", "gate")


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("name", ("auto", "triton"))
def test_modulation_per_token_runs_on_the_reference(op, name, device):
    """No kernel supports it, so a context is ignored; with equal rows, it equals modulation per sample."""
    case = Case(op, b=2, n=5, d=16, device=device)
    inputs = case.inputs()
    repeated = [
        t.detach().unsqueeze(1).repeat(1, case.n, 1).requires_grad_() if name in MODULATION else t
        for name, t in zip(INPUTS[op], inputs, strict=True)
    ]
    with use_backend(name), record() as log:
        expected, got = (case.call(*a, backend=None) for a in (inputs, repeated))
    assert log[op][-1] == "reference"
    gradients = (torch.autograd.grad(out, a, case.weights()) for out, a in ((expected, inputs), (got, repeated)))
    for argument, per_sample, per_token in zip(INPUTS[op], *gradients, strict=True):
        per_token = per_token.sum(1) if argument in MODULATION else per_token
        torch.testing.assert_close(per_token, per_sample, msg=argument)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (expected, got)), strict=True):
        torch.testing.assert_close(a, b)


def in_thread(function):
    """Run ``function`` in its own thread; return its result."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_threads_do_not_share_contexts_and_records():
    names, barrier = ("sdpa", "reference", "auto"), threading.Barrier(3)

    def work(name):
        found = []
        for _ in range(30):
            barrier.wait()
            with use_backend(name), record() as log:
                barrier.wait()
                ops.attention(torch.randn(2, 5, 24), 2)
            found.append(log)
        return found

    with ThreadPoolExecutor(3) as pool:
        for name, found in zip(names, pool.map(work, names), strict=True):
            assert found == [{"attention": ["sdpa" if name == "auto" else name]}] * 30
    assert names_in_force() == ("auto",)


def test_a_thread_starts_without_contexts():
    with use_backend("reference"):
        assert in_thread(names_in_force) == ("auto",)
        assert names_in_force() == ("reference", "auto")


def test_recompute_uses_the_backend_of_the_thread_that_calls_backward(device):
    """On a GPU, it runs in another thread."""
    case = Case("layer_norm_modulate", b=2, n=3, d=16, device=device)
    with use_backend("triton"), record() as log:
        out = checkpoint(lambda *a: case.call(*a, backend=None), *case.inputs(), use_reentrant=False)
        out.sum().backward()
    assert log == {"layer_norm_modulate": ["triton"] * 3}  # forward, recomputation, backward


@HOST
def test_backward_in_another_thread():
    qkv = torch.randn(2, 5, 24, requires_grad=True)
    with record() as log, use_backend("host"):
        out = ops.attention(qkv, 2)
    with use_backend("reference"):
        in_thread(lambda: out.sum().backward())
    assert log == {"attention": ["host", "host"]}


def test_a_tensor_leaked_from_a_function_transform(device):
    """It counts as the tensor it wraps, as in PyTorch's own operations."""
    kept = []
    torch.func.grad(lambda t: (kept.append(t), t.sum())[1])(torch.randn(2, 5, 16, device=device))
    row = torch.randn(2, 16, device=device, requires_grad=True)
    got, expected = (ops.layer_norm_modulate(kept[0], row, row, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert row.grad.isfinite().all()
