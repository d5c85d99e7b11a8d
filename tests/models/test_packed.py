"""Packed weights: the same function, never an outdated weight, and no obstacle to other changes of a Linear."""

import contextlib
import gc
import threading

import pytest
import torch
import torch.nn as nn

import ditfast
from ditfast.models import DiTBlock
from ditfast.ops import gemm
from ditfast.ops.backends import on_cpu, selfcheck

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="oneDNN has no bfloat16 for this CPU",
)
PRODUCT_IS_RIGHT = on_cpu.product_is_right
LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
BOTH = pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))


@pytest.fixture(autouse=True)
def taken(monkeypatch):
    """Let oneDNN and the kernels win everywhere; record the weight's layout in each call of oneDNN."""
    monkeypatch.setattr(on_cpu, "takes_onednn", lambda dtype: dtype != torch.float64)
    monkeypatch.setattr(on_cpu, "product_is_right", lambda *_: True)
    monkeypatch.setattr(on_cpu, "takes_host", lambda *_: True)
    monkeypatch.setattr(on_cpu, "is_below", lambda *_: False)
    layouts, onednn = [], gemm._onednn
    monkeypatch.setattr(gemm, "_onednn", lambda x, w, b: layouts.append(w.layout) or onednn(x, w, b))
    return layouts


@pytest.fixture
def block(kit):
    pytest.importorskip("ditfast._C")
    return kit.fill(DiTBlock(32, 2))


def run(block):
    p = next(block.parameters())
    generator = torch.Generator().manual_seed(1)
    x, c = (torch.randn(shape, generator=generator).to(p.dtype) for shape in ((2, 5, 32), (2, 32)))
    with torch.no_grad():
        return block(x, c)


def packed_calls(taken):
    count = taken.count(torch._mkldnn)
    taken.clear()
    return count


def assert_same(got, expected):
    rtol = 2e-5 if got.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@BOTH
def test_computes_the_same_and_is_undone(block, taken, dtype):
    block.to(dtype)
    with ditfast.use_backend("reference"):
        expected = run(block)
    assert not taken
    with ditfast.packed_weights(block):
        assert_same(run(block), expected)
        assert packed_calls(taken) == 5
    assert not gemm._packs.own
    assert_same(run(block), expected)
    assert len(taken) == 5 and not packed_calls(taken)


@pytest.mark.parametrize("factor", (1.0, 1.1))
def test_a_wrong_product_on_packed_weights_is_not_used(block, monkeypatch, tmp_path, factor):
    """Its self-check is part of that of `mlp`."""
    onednn, x, weight = gemm._onednn, torch.randn(6, 32).bfloat16(), block.attn.proj.weight.detach().bfloat16()
    monkeypatch.setattr(on_cpu, "product_is_right", PRODUCT_IS_RIGHT)
    monkeypatch.setenv("DITFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(selfcheck, "SIZE", (2, 9))
    monkeypatch.setattr(selfcheck, "_answers", {})
    monkeypatch.setattr(
        gemm, "_onednn", lambda x, w, b: onednn(x, w, b) * (1 if w.layout == torch.strided else factor)
    )
    told = contextlib.nullcontext() if factor == 1 else pytest.warns(match="mlp/host .* failed its self-check")
    with told, gemm.packed([weight]):
        out = gemm.linear_with_autograd(x, weight, None, ("auto",))
    torch.testing.assert_close(out, x @ weight.t(), rtol=0.02, atol=0.02)


def test_a_whole_model(kit, taken):
    model, batch = kit.tiny(), kit.batch()
    with torch.no_grad():
        expected = model(*batch)
        with ditfast.packed_weights(model):
            kit.close(model(*batch), expected, 2e-5)
            assert packed_calls(taken) == 3 * 5 + 1


def in_place(linear):
    with torch.no_grad():
        linear.weight.mul_(2)


def loaded(linear):
    linear.load_state_dict({name: 2 * value for name, value in linear.state_dict().items()})


def replaced(linear):
    linear.weight = nn.Parameter(2 * linear.weight.detach())


def other_memory_twice(linear):
    """Twice, because the allocator reuses the memory that was freed first."""
    for _ in range(2):
        linear.weight.data = 2 * linear.weight.data


def through_data_and_told(linear):
    linear.weight.data.mul_(2)
    torch.autograd.graph.increment_version(linear.weight)


def hooked(linear):
    linear.register_forward_hook(lambda module, args, out: 2 * out)


def patched(linear):
    original = linear.forward
    linear.forward = lambda x: 2 * original(x)


CHANGES = (in_place, loaded, replaced, other_memory_twice, through_data_and_told, hooked, patched)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", LINEARS)
def test_changes_to_a_packed_linear_take_effect(block, taken, name, change):
    with ditfast.packed_weights(block):
        before = run(block)
        packed_calls(taken)
        change(block.get_submodule(name))
        got = run(block)
        assert 3 <= packed_calls(taken) <= 4  # with a changed fc1 or fc2, the whole MLP may leave the fused operation
    assert not torch.allclose(got, before, rtol=1e-3)
    with ditfast.use_backend("reference"):
        assert_same(got, run(block))


def test_a_replaced_linear_is_called(block, taken):
    with ditfast.packed_weights(block):
        block.attn.proj = nn.Sequential(block.attn.proj, nn.Hardtanh(-0.1, 0.1))
        run(block)
        assert packed_calls(taken) == 4


def test_not_used_with_gradients_autocast_and_transforms(block, taken):
    x, c = torch.randn(2, 5, 32), torch.randn(2, 32)
    with ditfast.packed_weights(block):
        torch.autograd.grad(block(x, c).sum(), list(block.parameters()))
        assert not packed_calls(taken)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            block(x, c)
        assert not packed_calls(taken)
        with torch.no_grad():
            expected = block(x, c)
            assert packed_calls(taken) == 5
            doubled = {name: 2 * p for name, p in block.named_parameters()}
            got = torch.func.functional_call(block, doubled, (x, c))
            assert not torch.allclose(got, expected, rtol=1e-3) and not packed_calls(taken)
            torch.func.vmap(block, randomness="error")(x.expand(3, 2, 5, 32), c.expand(3, 2, 32))
            torch.func.jvp(lambda x: ditfast.ops.mlp(x, *block.mlp._weights(), backend="reference"), (x,), (x,))
            assert not packed_calls(taken)


def test_used_under_autocast_if_weights_have_its_dtype(block, taken):
    block.to(torch.bfloat16)
    x, c = torch.randn(2, 5, 32), torch.randn(2, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with ditfast.use_backend("reference"):
            expected = block(x, c)
        with ditfast.packed_weights(block):
            got = block(x, c)
    assert packed_calls(taken) == 5 and got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_right_under_compile(block):
    with ditfast.packed_weights(block), torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        x, c = torch.randn(2, 5, 32), torch.randn(2, 32)
        assert_same(compiled(x, c), block(x, c))
        block.mlp.fc1.weight.mul_(2)
        assert_same(compiled(x, c), block(x, c))


def test_affects_only_its_own_thread_and_nests(block, taken):
    with ditfast.packed_weights(block):
        with ditfast.packed_weights(DiTBlock(32, 2)):
            run(block)
            assert packed_calls(taken) == 5
        thread = threading.Thread(target=run, args=(block,))
        thread.start()
        thread.join()
        assert not packed_calls(taken)
        run(block)
        assert packed_calls(taken) == 5


def test_memory_is_freed(block):
    with ditfast.packed_weights(block):
        assert len(gemm._packs.own) == 5
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is torch.Tensor and t.layout == torch._mkldnn]


def test_nothing_is_packed_without_a_gain(block, monkeypatch):
    monkeypatch.setattr(on_cpu, "takes_onednn", lambda *_: False)
    with ditfast.packed_weights(block), ditfast.packed_weights(nn.Linear(2, 2, device="meta")):
        assert not gemm._packs.own


def test_a_model_must_be_a_module():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"), ditfast.packed_weights("DiT"):
        pass
