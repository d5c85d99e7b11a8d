"""torch.compile without graph breaks. aot_eager runs the traced graphs; the slow test also generates code."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ditfast import use_backend
from ditfast.ops.backends import availability, log, on_cpu


@pytest.fixture(autouse=True)
def fresh_caches():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def check(kit, model, compiled, size=3, grad_rtol=1e-5):
    x, t, y = kit.batch(size)
    x.requires_grad_()
    out, expected = compiled(x, t, y), model(x, t, y)
    kit.close(out, expected, 5e-6)
    kit.close(kit.gradients(model, out, x), kit.gradients(model, expected, x), grad_rtol)


def compiled(model, **options):
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


def test_model(kit):
    model = kit.tiny(depth=2)
    check(kit, model, compiled(model))


def test_dynamic_batch(kit):
    model = kit.tiny(depth=1)
    fast = compiled(model, dynamic=True)
    for size in (3, 5, 2):
        with torch.compiler.set_stance("fail_on_recompile" if size != 3 else "default"):
            check(kit, model, fast, size)


@pytest.mark.skipif(not availability._installed["ditfast._C"], reason="the extension is not built")
@pytest.mark.parametrize("smallest", (1, 10_000))
def test_one_graph_whatever_size_the_kernels_are_faster_from(kit, smallest, monkeypatch):
    """Batches below and above it. The kernels run only where every batch is large enough."""
    monkeypatch.setattr(on_cpu, "_faster_from", lambda *_: smallest)
    model = kit.tiny(depth=1)
    fast = compiled(model, dynamic=True)
    for size in (2, 3, 40):
        with torch.compiler.set_stance("fail_on_recompile" if size != 2 else "default"), log.record() as ran:
            out = fast(*kit.batch(size))
        assert ("host" in sum(ran.values(), [])) == (smallest == 1)
        kit.close(out, model(*kit.batch(size)), 5e-6)
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, kit.batch(3), dynamic_shapes=({0: batch},) * 3).module()
    kit.close(exported(*kit.batch(40)), model(*kit.batch(40)), 5e-6)


def test_return_hidden(kit):
    model, inputs = kit.tiny(depth=2), kit.batch()
    out, hidden = compiled(model)(*inputs, return_hidden=[1, 0])
    expected, expected_hidden = model(*inputs, return_hidden=[1, 0])
    kit.close(out, expected, 5e-6)
    for got, want in zip(hidden, expected_hidden, strict=True):
        kit.close(got, want, 5e-6)


def test_regional(kit):
    """Blocks compiled one by one take and return a Carry."""
    plain, model = kit.tiny(), kit.tiny()
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    check(kit, model, model)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = compiled(block)
    kit.close(model(*kit.batch()), plain(*kit.batch()), 5e-6)


def test_checkpointed_blocks(kit):
    model = kit.tiny(depth=2)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    check(kit, model, compiled(model))


def test_autocast(kit):
    model, inputs = kit.tiny(depth=1), kit.batch()
    with torch.autocast("cpu", torch.bfloat16):
        kit.close(compiled(model)(*inputs).float(), model(*inputs).float(), 0.02)


def test_backend_chosen_after_compilation(kit):
    model, inputs = kit.tiny(depth=1), kit.batch()
    fast = compiled(model)
    expected = fast(*inputs)
    with use_backend("reference"):
        kit.close(fast(*inputs), expected, 5e-6)


def test_swapped_after_compilation(kit):
    model, inputs = kit.tiny(depth=1), kit.batch()
    fast = compiled(model)
    before = fast(*inputs)
    model.blocks[0].mlp.act = torch.nn.ReLU()
    assert not torch.allclose(fast(*inputs), before)
    kit.close(fast(*inputs), model(*inputs), 5e-6)


@pytest.mark.slow
def test_generated_code(kit):
    model = kit.tiny(depth=1)
    # if the generated exp rounds a frequency differently, an angle of up to 999 changes by 2**-14
    check(kit, model, torch.compile(model, fullgraph=True), grad_rtol=2.0**-14)


@torch.no_grad()
def test_scales_of_guidance(kit):
    """Another number is not compiled into a constant, which its check once broke."""
    model, (x, t, y) = kit.tiny(depth=0), kit.batch(4)
    compiled = torch.compile(model.forward_with_cfg, fullgraph=True, backend="eager")
    for scale in (2.0, 3.0, 4.5, torch.tensor([1.0, 2.0])):
        kit.close(compiled(x, t, y, scale), model.forward_with_cfg(x, t, y, scale), 1e-6)
