"""The model computes the same on every backend, carried or block by block, eager or compiled."""

import contextlib

import pytest
import torch

from ditfast import ops
from ditfast.ops.backends.choice import use_backend
from ditfast.ops.backends.log import record

KERNELS = ("host",)


@contextlib.contextmanager
def on(*names):
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(use_backend(name))
        yield


def run(kit, model, forward):
    x, t, y = kit.batch()
    x.requires_grad_()
    out = forward(x, t, y)
    return {"out": out, **kit.gradients(model, out, x)}


def alone(model, x, t, y):
    tokens = ops.patch_embed(
        x, model.x_embedder.proj.weight, model.x_embedder.proj.bias, model.pos_embed, model.patch_size
    )
    c = model.t_embedder(t) + model.y_embedder(y, False)
    for block in model.blocks:
        tokens = block(tokens, c)
    return model.unpatchify(model.final_layer(tokens, c))


@pytest.mark.parametrize("recompute", (False, True))
def test_kernels_match_the_reference(kit, recompute):
    model = kit.tiny(recompute_mlp=recompute)
    with on("reference"):
        expected = run(kit, model, model)
    with on("host"), record() as ran:
        got = run(kit, model, model)
    assert {name for names in ran.values() for name in names} == {"host"}
    assert set(ran) == {op.name for op in ops.ALL} - {"gated_residual"}
    kit.close(got, expected, 1e-5)
    with on("triton", "sdpa"), record() as ran:  # attention uses PyTorch's, which supports any head dim
        got = run(kit, model, model)
    assert {name for op in ran if op != "attention" for name in ran[op]} == {"triton"}
    kit.close(got, expected, 1e-5)


@pytest.mark.parametrize("names", (("reference",), ("sdpa",), ("host",)), ids="+".join)
def test_carried_equals_block_by_block(kit, names):
    model = kit.tiny()
    with on(*names):
        kit.close(run(kit, model, model), run(kit, model, lambda *a: alone(model, *a)), 1e-5)


def test_autocast_on_kernels_is_as_exact_as_on_the_reference(kit):
    model = kit.tiny()
    exact = run(kit, model, model)["out"]
    errors = {}
    for names in (("reference",), KERNELS):
        with on(*names), torch.autocast("cpu", torch.bfloat16):
            errors[names] = (run(kit, model, model)["out"].float() - exact).norm()
    assert errors[KERNELS] <= 1.5 * errors["reference",]


class Adapted(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 1.5


def adapt(linear):
    linear.__class__ = Adapted


def hook(linear):
    linear.register_forward_hook(lambda module, args, out: out * 1.5)


@pytest.mark.parametrize("change", (adapt, hook))
def test_a_changed_qkv_linear_is_called(kit, change):
    """The other block keeps using the fused node, which inference does not need."""
    model = kit.tiny(depth=2)
    change(model.blocks[0].attn.qkv)
    with on("reference"):
        expected = run(kit, model, model)
    with on("host"), record() as ran:
        kit.close(run(kit, model, model), expected, 1e-5)
    assert ran["qkv_attention"] == ["host"] * 2 and ran["attention"] == ["host"] * 4
    with on("host"), torch.no_grad(), record() as ran:
        model(*kit.batch())
    assert "qkv_attention" not in ran and ran["attention"] == ["host"] * 2


@pytest.mark.parametrize("name", ("reference", "sdpa", "auto"))
def test_without_a_kernel_the_qkv_linear_is_plain(kit, name):
    model = kit.tiny(depth=1)
    with on(name), record() as ran:
        run(kit, model, model)
    assert "qkv_attention" not in ran and len(ran["attention"]) == 1


def test_compiled_on_kernels(kit):
    model = kit.tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with on(*KERNELS):
        kit.close(run(kit, model, compiled), run(kit, model, model), 1e-6)


def test_checkpointed_blocks_recompute_on_the_kernels_of_their_forward(kit):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, expected = kit.tiny(), kit.tiny()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block)
    x, t, y = kit.batch()
    with on(*KERNELS):
        loss, reference = model(x, t, y).square().sum(), expected(x, t, y).square().sum()
    with record() as ran:  # the context has ended: only the carry knows forward's backend
        loss.backward()
    reference.backward()
    assert {name for names in ran.values() for name in names} == {"host"}
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, msg=name)
