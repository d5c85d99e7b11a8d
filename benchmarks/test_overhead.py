"""Python overhead of one call of an operation or block, in microseconds: `pytest benchmarks/test_overhead.py`.

Tensors are tiny and kernels only allocate their outputs; what remains is checks, the choice of backend, dispatch and
autograd. `plain` uses PyTorch operations, including their arithmetic.
"""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from ditfast import DiTBlock, ops
from ditfast.ops import extension
from harness.block.eager import EagerBlock

B, N, D, H = 1, 4, 128, 2


def rows(*shape):
    return torch.randn(shape)


def modulate(x, shift, scale):
    return F.layer_norm(x, (D,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def residual(x, y, gate):
    return x + gate.unsqueeze(1) * y


def junction(x, y, gate, shift, scale):
    x = residual(x, y, gate)
    return x, modulate(x, shift, scale)


def attention(qkv, num_heads):
    q, k, v = qkv.view(B, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, D)


def qkv_attention(h, weight, bias, num_heads):
    return attention(F.linear(h, weight, bias), num_heads)


X, ROW = (B, N, D), (B, D)
CASES = {  # name: (ours, plain, shapes of the tensors, other arguments)
    "layer_norm_modulate": (ops.layer_norm_modulate, modulate, (X, ROW, ROW), ()),
    "gated_residual": (ops.gated_residual, residual, (X, X, ROW), ()),
    "junction": (ops.gated_residual_layer_norm_modulate, junction, (X, X, ROW, ROW, ROW), ()),
    "attention": (ops.attention, attention, ((B, N, 3 * D),), (H,)),
    "qkv_attention": (ops.qkv_attention, qkv_attention, (X, (3 * D, D), (3 * D,)), (H,)),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Run on one thread: waking a second one would take longer than a call."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def kernels(monkeypatch):
    """Make the Triton backend available on the CPU, with launchers that only allocate; `host` is unchanged."""
    pytest.importorskip("triton")
    monkeypatch.setattr("ditfast.ops.backends.choice.why_not", lambda *args: None)

    def outputs(x, *rest):  # as the kernels' own launchers allocate
        b, n, _ = x.shape
        return x.new_empty(*x.shape), *(x.new_empty(b, n, dtype=torch.float32) for _ in range(2))

    launchers = {
        "layer_norm_modulate": outputs,
        "gated_residual": lambda x, *rest: x.new_empty(*x.shape),
        "junction": lambda x, *rest: (x.new_empty(*x.shape), *outputs(x)),
        "attention": lambda qkv, heads, *rest: extension.empty_outputs(qkv, heads),
    }
    for name, launcher in launchers.items():
        monkeypatch.setattr(import_module(f"ditfast.kernels.{name}"), "forward", launcher)


def arguments(name, grad):
    *_, shapes, rest = CASES[name]
    return [*(rows(*shape).requires_grad_(grad) for shape in shapes), *rest]


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("path", ["plain", "reference", "triton", "host"])
def test_op(benchmark, kernels, path, name, grad):
    ours, plain, *_ = CASES[name]
    if path == "host":
        pytest.importorskip("ditfast._C")
    benchmark.group = f"{name}, {'grad' if grad else 'no grad'}"
    options = {} if path == "plain" else {"backend": path}
    benchmark(plain if path == "plain" else ours, *arguments(name, grad), **options)


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("path", ["plain", "reference", "triton", "host"])
def test_block(benchmark, kernels, path, grad):
    if path == "host":
        pytest.importorskip("ditfast._C")
    block = EagerBlock(D, H) if path == "plain" else DiTBlock(D, H)
    x, c = rows(*X), rows(*ROW)
    benchmark.group = f"block, {'grad' if grad else 'no grad'}"
    with torch.set_grad_enabled(grad), ops.use_backend("auto" if path == "plain" else path):
        benchmark(block, x, c)
