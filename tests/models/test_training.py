"""Checkpointing, choice of backend, autocast."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ditfast import use_backend
from ditfast.ops.backends.choice import names_in_force
from ditfast.ops.backends.log import record

IMPLEMENTATIONS = [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT]


@pytest.fixture
def inputs(kit):
    x, t, y = kit.batch()
    return x.requires_grad_(), t, y


def checkpointed(model, implementation):
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, checkpoint_impl=implementation)
    return model


def backward(out):
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()


def grads(model, x):
    named = ((name.replace("_checkpoint_wrapped_module.", ""), p) for name, p in model.named_parameters())
    return {"x": x.grad, **{name: p.grad for name, p in named if p.requires_grad}}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_checkpointed_blocks(kit, implementation):
    results = []
    for model in (kit.tiny(), checkpointed(kit.tiny(), implementation)):
        x, t, y = kit.batch()
        out = model(x.requires_grad_(), t, y)
        backward(out)
        results.append((out, grads(model, x)))
    (plain, plain_grads), (out, out_grads) = results
    kit.close(out, plain, 2e-6)
    kit.close(out_grads, plain_grads, 5e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_of_a_single_block(kit, reentrant):
    block, c = kit.tiny().blocks[0], kit.arr("c", (2, 32))
    results = []
    for call in (block, lambda x, c: checkpoint(block, x, c, use_reentrant=reentrant)):
        block.zero_grad()
        x = kit.arr("tokens", (2, 5, 32)).requires_grad_()
        backward(call(x, c))
        results.append({name: grad.clone() for name, grad in grads(block, x).items()})
    kit.close(*results, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_recompute_uses_the_backend_of_forward(kit, inputs, implementation):
    assert names_in_force() == ("auto",)
    model = checkpointed(kit.tiny(), implementation)
    with record() as log:
        with use_backend("reference"):
            out = model(*inputs)
        assert log["attention"] == ["reference"] * 3
        backward(out)
    assert set(log["attention"]) == {"reference"} and len(log["attention"]) > 3
    with record() as log:
        model(*inputs)
    assert log["attention"] == ["sdpa"] * 3


def test_the_models_backend_comes_first(kit, inputs):
    model = kit.tiny(backend="reference")
    with record() as log, use_backend("sdpa"):
        model(*inputs)
        kit.tiny()(*inputs)
    assert log["attention"] == ["reference"] * 3 + ["sdpa"] * 3
    assert set(log["unpatchify"]) == {"reference"}


def test_backend_reaches_hooked_modules(kit, inputs):
    model = kit.tiny(backend="reference")
    model.blocks[0].register_forward_hook(lambda *args: None)
    model.blocks[1].attn.register_forward_hook(lambda *args: None)
    with record() as log:
        model(*inputs)
    assert log["attention"] == ["reference"] * 3


def test_autocast(kit, inputs):
    model = kit.tiny()
    expected = model(*inputs)
    expected_grads = kit.gradients(model, expected, inputs[0])
    with torch.autocast("cpu", torch.bfloat16):
        out, (tokens,) = model(*inputs, return_hidden=[1])
    assert tokens.dtype == torch.float32  # the residual stream keeps its precision
    assert out.dtype == torch.bfloat16
    kit.close(out.float(), expected, 0.03)
    for name, grad in kit.gradients(model, out, inputs[0]).items():
        assert grad.dtype == torch.float32, name
        error = (grad - expected_grads[name]).norm() / expected_grads[name].norm()
        assert error < 0.05, name


class Casts(TorchDispatchMode):
    """Counts how often each of these tensors is copied to another dtype."""

    def __init__(self, tensors):
        super().__init__()
        self.times = {p.data_ptr(): 0 for p in tensors}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.times:
            self.times[args[0].data_ptr()] += out.dtype != args[0].dtype
        return out


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", ["reference", "auto", "host"])
def test_autocast_casts_a_weight_once_in_a_step(kit, inputs, backend, recompute):
    """Forward, recomputation and backward read the same copy."""
    if backend == "host":
        pytest.importorskip("ditfast._C")
    model = kit.tiny(recompute_mlp=recompute)
    weights = [p for p in model.parameters() if p.requires_grad]
    with use_backend(backend), Casts(weights) as casts:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*inputs)
        backward(out)
    assert max(casts.times.values()) == 1
    linears = [m.weight for block in model.blocks for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert all(casts.times[w.data_ptr()] == 1 for w in linears)


@torch.no_grad()
def test_autocast_equals_the_original_sequence(kit):
    model, inputs = kit.tiny(), kit.batch()
    with torch.autocast("cpu", torch.bfloat16):
        kit.close(model(*inputs).float(), kit.original(model, *inputs).float(), 0.02)


@torch.no_grad()
def test_input_of_another_dtype_under_autocast(kit):
    x, t, y = kit.batch()
    with torch.autocast("cpu", torch.bfloat16):
        kit.close(kit.tiny()(x.bfloat16(), t, y).float(), kit.tiny()(x, t, y).float(), 0.03)


def test_label_dropout_only_in_training(kit):
    model = kit.tiny(class_dropout_prob=0.999)
    x, t, y = kit.batch()
    null = torch.full_like(y, 7)
    assert not torch.equal(model(x, t, y), model(x, t, null))
    model.train()
    kit.close(model(x, t, y), model(x, t, null), 1e-6)


@torch.no_grad()
def test_guided_channels(kit):
    model, (x, t, y) = kit.tiny(), kit.batch(4)
    out = model(torch.cat([x[:2], x[:2]]), t, y)
    cond, uncond = out.chunk(2)
    for channels in (0, 3, 8):
        got = model.forward_with_cfg(x, t, y, 2.5, cfg_channels=channels)
        guided = (uncond + 2.5 * (cond - uncond))[:, :channels]
        kit.close(got[:2, :channels], guided, 1e-6)
        kit.close(got[2:, :channels], guided, 1e-6)
        kit.close(got[:, channels:], out[:, channels:], 1e-6)


@torch.no_grad()
def test_guidance_by_another_scale_for_every_sample(kit):
    """Ten samples of width 10: a vector of scales must not broadcast over the width. Flows pass it on."""
    from ditfast.flow import Sampler, create_transport
    from ditfast.sampling.engine import Engine

    model, (x, t, y) = kit.tiny(), kit.batch(20)
    t[:], scales = 500, torch.linspace(1, 8, 10)
    each = [model.forward_with_cfg(x[i::10], t[i::10], y[i::10], s.item())[:1] for i, s in enumerate(scales)]
    for call in (model.forward_with_cfg, Engine(model).forward_with_cfg):
        for scale in (scales, scales.view(-1, 1, 1, 1), scales.double()):
            got = call(x, t, y, scale)
            assert got.dtype == x.dtype
            kit.close(got[:10], torch.cat(each), 1e-5)
        kit.close(call(x, t, y, scales[1]), call(x, t, y, scales[1].item()), 1e-6)
        euler = Sampler(create_transport()).sample_ode(sampling_method="euler", num_steps=2, last_only=True)
        twice = x[:10].repeat(2, 1, 1, 1)
        kit.close(
            euler(twice, call, y=y, cfg_scale=scales)[-1][:10],
            (twice + call(twice, t * 0, y, scales)[:, :4])[:10],
            1e-5,
        )
