"""A model under forward-mode AD, as few-step training needs it: on kernels, with plain PyTorch's results."""

import contextlib
import re
from pathlib import Path

import pytest
import torch
from contract import assert_contract
from original_dit import original
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ditfast.models.conditioning import CONDITIONINGS
from ditfast.ops.backends.availability import why_not_loaded
from ditfast.ops.backends.choice import use_backend
from ditfast.ops.backends.log import record

KERNELS = "triton" if why_not_loaded() else "host"  # the faster one on a CPU


@pytest.fixture
def case(kit):
    """A function that returns a model, inputs of three samples, and tangents of latents and timesteps."""

    def make(dtype=torch.float32, **changes):
        model = kit.tiny(**{"depth": 2, "num_heads": 1, "hidden_size": 64, **changes}).to(dtype)
        x, t, y = kit.batch()
        x, t = x.to(torch.bfloat16).to(dtype), t.to(dtype) * 0.75
        return (
            model,
            (x, t, y),
            (kit.arr("v", x.shape).to(torch.bfloat16).to(dtype), kit.arr("dt", t.shape).to(dtype)),
        )

    return make


def step(call, model, inputs, tangents):
    """u, its tangent, and gradients of |u - (v - du)|², where du is a constant, as in MeanFlow training."""
    (x, t, y), (v, _) = inputs, tangents
    u, du = call(lambda x, t: model(x, t, y), (x, t), tangents)
    du = du.detach()
    loss = (u - (torch.cat([v, v], dim=1) - du)).float().square().mean()
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {
        "u": u.detach(),
        "du": du,
        **dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True)),
    }


def by_dual_level(function, inputs, tangents):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(*map(forward_ad.make_dual, inputs, tangents))))


def plain(model):
    """The original's operations, with attention as explicit products and a softmax."""

    class Plain:
        named_parameters = model.named_parameters

        def __call__(self, *inputs):
            with sdpa_kernel(SDPBackend.MATH):
                return original(model, *inputs)

    return Plain()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_step_equals_plain_pytorch(case, dtype):
    exact = step(jvp, *(f(a) for f, a in zip((plain, tuple, tuple), case(torch.float64), strict=True)))
    model, *rest = case(dtype)
    low = step(jvp, plain(model), *rest)
    with use_backend(KERNELS), record() as log:
        got = step(jvp, model, *rest)
        assert {name for ran in log.values() for name in ran} == {KERNELS}
    for name, value in got.items():
        assert_contract(name, value, low[name], exact[name], per_sample=name in ("u", "du"))


def test_tangents_are_the_limit_of_differences(case, kit):
    """For timesteps below 8, since their angles are float32, with a fourth-order formula."""
    model, (x, t, y), (v, dt) = case(torch.float64)
    t, h = t / 100, 0.01
    _, du = jvp(lambda x, t: model(x, t, y), (x, t), (v, dt))
    far_behind, behind, ahead, far_ahead = (model(x + e * v, t + e * dt, y) for e in (-2 * h, -h, h, 2 * h))
    kit.close(du, (8 * (ahead - behind) - (far_ahead - far_behind)) / (12 * h), 1e-4)


@pytest.mark.parametrize("kind", CONDITIONINGS)
@pytest.mark.parametrize("recompute", (False, True), ids=("kept", "recomputed"))
def test_every_conditioning_equals_the_reference(case, kit, kind, recompute):
    problem = case(conditioning=kind, recompute_mlp=recompute)
    with use_backend("reference"):
        expected = step(jvp, *problem)
    for call in (jvp, by_dual_level):
        with use_backend(KERNELS):
            kit.close(step(call, *problem), expected, 2e-5)


def count_products(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize("kind", CONDITIONINGS)
def test_a_linear_takes_two_products(case, kind):
    """PyTorch computes three: it also multiplies the input by the weight's tangent, which is zero."""
    model, (x, t, y), tangents = case(conditioning=kind)
    linears = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    embedding = KERNELS == "host"  # Triton has a kernel for its product

    def products(call):
        return count_products(lambda: call(lambda x, t: model(x, t, y), (x, t), tangents))

    with use_backend(KERNELS):
        found = [products(call) for call in (jvp, by_dual_level)]
    assert found == [2 * (linears + embedding)] * 2
    if kind == "adaln_zero":
        assert products(jvp) == 2 * linears, "small blocks, without kernels"


@pytest.mark.parametrize("moved", ("x", "t"))
def test_a_single_tangent(case, kit, moved):
    model, (x, t, y), (v, dt) = case()

    def tangent():
        if moved == "x":
            return jvp(lambda x: model(x, t.long(), y), (x,), (v,))[1]
        return jvp(lambda t: model(x, t, y), (t[:1],), (dt[:1],))[1]

    with use_backend("reference"):
        expected = tangent()
    with use_backend(KERNELS):
        kit.close(tangent(), expected, 1e-5)


def test_hidden_tokens_guidance_and_columns(case, kit):
    model, (x, t, y), (v, dt) = case()

    def hidden(x, t):
        out, tokens = model(x, t, y, return_hidden=[1, 0])
        return out, *tokens

    def guided(x, t):
        return model.forward_with_cfg(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, y * 0 + 7]), 4.0)

    def found():
        columns = vmap(lambda v: jvp(lambda x: model(x, t, y), (x,), (v,))[1])(torch.stack([v, x, -v]))
        parts = *jvp(hidden, (x, t), (v, dt))[1], *jvp(guided, (x, t), (v, dt)), columns
        return dict(enumerate(parts))

    with use_backend("reference"):
        expected = found()
    with use_backend(KERNELS):
        kit.close(found(), expected, 1e-5)


def test_autocast(case):
    """As close to float64 as plain PyTorch under autocast."""
    model, *rest = case()
    with torch.autocast("cpu", torch.bfloat16):
        low = step(jvp, plain(model), *rest)
        with use_backend(KERNELS):
            got = step(jvp, model, *rest)
    exact = step(jvp, *(f(a) for f, a in zip((plain, tuple, tuple), case(torch.float64), strict=True)))
    for name, value in got.items():
        assert_contract(name, value, low[name], exact[name], per_sample=name in ("u", "du"))


def compiled_step(model, inputs, tangents):
    def run(x, t, v, dt):
        u, du = jvp(lambda x, t: model(x, t, inputs[2]), (x, t), (v, dt))
        return u, du.detach()

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    return step(lambda function, inputs, tangents: compiled(*inputs, *tangents), model, inputs, tangents)


def test_compiled_step(case, kit):
    """The tangent is detached inside, where blocks may be checkpointed."""
    model, *rest = case()
    with use_backend(KERNELS):
        expected = step(jvp, model, *rest)
        model.blocks[1] = checkpoint_wrapper(model.blocks[1])
        got = compiled_step(model, *rest)
    kit.close({name.replace("_checkpoint_wrapped_module.", ""): t for name, t in got.items()}, expected, 1e-5)


def test_bad_tangents_are_named(case):
    model, (x, t, y), (v, dt) = case()

    def refused(error, message, inputs, tangents):
        with pytest.raises(error, match=message):
            jvp(lambda x, t: model(x, t, y), inputs, tangents)

    for name in (KERNELS, "reference"):
        with use_backend(name):
            refused(ValueError, "floating point.*got: torch.int64", (x, t.long()), (v, dt))
            refused(RuntimeError, "different size", (x, t), (v[:1], dt))
            refused(
                TypeError,
                "the tangent of x must have its dtype, torch.float32, got torch.bfloat16",
                (x, t),
                (v.bfloat16(), dt),
            )
            refused(
                TypeError,
                "the tangent of t must have its dtype, torch.float32, got torch.float64",
                (x, t),
                (v, dt.double()),
            )


def test_checkpointed_blocks_are_rejected_in_eager_mode(case):
    model, inputs, tangents = case()
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    for name in (KERNELS, "reference"):
        with use_backend(name):
            with pytest.raises(
                NotImplementedError, match="activation checkpointing does not support tangents in eager mode"
            ):
                step(jvp, model, inputs, tangents)
            with torch.no_grad():
                assert jvp(lambda x: model(x, *inputs[1:]), inputs[:1], tangents[:1])[1].isfinite().all()


@pytest.mark.parametrize("backend", (KERNELS, "reference"))
def test_the_gradient_of_a_tangent_is_rejected_or_right(case, backend):
    model, (x, t, y), tangents = case()
    context = (
        contextlib.nullcontext()
        if backend == "reference"
        else pytest.raises(NotImplementedError, match="the gradient of a tangent")
    )
    with use_backend(backend), context:
        _, du = jvp(lambda x, t: model(x, t, y), (x, t), tangents)
        du.square().sum().backward()
        assert model.blocks[0].mlp.fc1.weight.grad.abs().max() > 0


def test_a_step_keeps_no_more_for_backward_than_without_tangents(case):
    """Tangents saved by PyTorch's Linears are freed when the next kernel reads them, long before the end."""
    model, (x, t, y), tangents = case()

    def most_alive(run):
        """The maximum of bytes saved at any time; tensors saved twice count twice."""
        sizes, most = {}, 0

        class Saved:
            def __init__(self, tensor):
                nonlocal most
                self.tensor, sizes[id(self)] = tensor, tensor.numel() * tensor.element_size()
                most = max(most, sum(sizes.values()))

            def __del__(self):
                del sizes[id(self)]

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            out = run()
        assert out is not None
        return most

    with use_backend(KERNELS):
        without = most_alive(lambda: model(x, t, y))
        with_tangents = most_alive(lambda: jvp(lambda x, t: model(x, t, y), (x, t), tangents))
    with use_backend("reference"):
        plain = most_alive(lambda: jvp(lambda x, t: model(x, t, y), (x, t), tangents))
    assert with_tangents < 1.3 * without < plain


def test_the_example_in_the_docs():
    text = (Path(__file__).parents[2] / "docs" / "derivatives.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(example.splitlines()) <= 10
    names = {}
    exec(example, names)
    assert names["du"].isfinite().all() and names["model"].final_layer.linear.weight.grad.abs().max() > 0
