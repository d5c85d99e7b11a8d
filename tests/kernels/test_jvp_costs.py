"""Bytes moved and products computed by a pass for primal and tangent, counted while the interpreter runs it."""

import pytest
import torch

interpreter = pytest.importorskip("triton.runtime.interpreter")

from attention_cases import sample  # noqa: E402
from ops.row_jvps import FILE, RowJvp  # noqa: E402

from ditfast.kernels import attention, attention_jvp, rows  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter"),
]


@pytest.fixture
def count(monkeypatch):
    """A function that runs another and returns the bytes it loads and stores, and its products' operations."""
    counted = {"bytes": 0, "operations": 0}

    def watch(name, key, cost):
        original = getattr(interpreter.InterpreterBuilder, name)

        def watched(self, *args):
            counted[key] += cost(*args)
            return original(self, *args)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, watched)

    def width(pointers):
        return pointers.get_element_ty().primitive_bitwidth // 8

    watch("create_masked_load", "bytes", lambda at, mask, *_: int(mask.data.sum()) * width(at))
    watch("create_masked_store", "bytes", lambda at, _, mask, *__: int(mask.data.sum()) * width(at))
    watch("create_dot", "operations", lambda a, b, *_: 2 * a.data.size * b.data.shape[-1])

    def run(function, *args):
        counted.update(bytes=0, operations=0)
        function(*args)
        return dict(counted)

    return run


@pytest.mark.parametrize("op", FILE)
@pytest.mark.parametrize("dtype", ("bf16", "mixed"))
def test_bytes_of_rows(op, dtype, count, monkeypatch):
    monkeypatch.setattr(rows, "_chunk_size", lambda *_, **__: 4)
    case = RowJvp(op, dtype, b=1, n=8, d=40)
    primals, options = case.primals(), case.options()
    forward = count(lambda: case.kernel().forward(**primals, **options))["bytes"]
    both = count(case.by_kernel)["bytes"]
    assert 1.9 * forward < both <= 2.2 * forward


def test_operations_of_attention(count):
    qkv, _ = sample(1, 33, 1, 72, torch.float16)
    forward = count(attention.forward, qkv, 1, 0.125)["operations"]
    both = count(attention_jvp.jvp, qkv, qkv, 1, 0.125)["operations"]
    assert forward > 0 and both <= 3.2 * forward
