"""The four ways to condition: parameters, gradients, the plain composition, kernels, training, compile."""

import contextlib
import copy

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

import ditfast
from ditfast.models import DiT, DiT_models, DiTBlock, modulate
from ditfast.models.conditioning import CONDITIONINGS
from ditfast.ops.backends.choice import use_backend
from ditfast.ops.backends.log import record

OTHERS = ("adaln", "cross_attention", "in_context")
every = pytest.mark.parametrize("kind", CONDITIONINGS)
others = pytest.mark.parametrize("kind", OTHERS)
# attention inside qkv_attention, patchify in the backward of patch_embed
IN_ALL = {"patch_embed", "patchify", "qkv_attention", "attention", "mlp", "unpatchify"}


def plain_attention(q, k, v, heads):
    """(B, N, D), (B, M, D), (B, M, D) -> (B, N, D), head by head."""
    out = []
    for i, j, o in zip(*(t.chunk(heads, dim=-1) for t in (q, k, v)), strict=True):
        out.append(torch.softmax(i @ j.mT / i.shape[-1] ** 0.5, dim=-1) @ o)
    return torch.cat(out, dim=-1)


def plain_self_attention(attn, h):
    return attn.proj(plain_attention(*attn.qkv(h).chunk(3, dim=-1), attn.num_heads))


def plain_mlp(mlp, h):
    return mlp.fc2(mlp.act(mlp.fc1(h)))


def plain_adaln(block, x, c):
    shift_a, scale_a, shift_m, scale_m = block.adaLN_modulation(c).chunk(4, dim=1)
    x = x + plain_self_attention(block.attn, modulate(block.norm1(x), shift_a, scale_a))
    return x + plain_mlp(block.mlp, modulate(block.norm2(x), shift_m, scale_m))


def plain_cross_attention(block, x, c):
    cross = block.cross_attn
    x = x + plain_self_attention(block.attn, block.norm1(x))
    k, v = cross.kv(c).chunk(2, dim=-1)
    x = x + cross.proj(plain_attention(cross.q(block.norm_cross(x)), k, v, cross.num_heads))
    return x + plain_mlp(block.mlp, block.norm2(x))


def plain_in_context(block, x, c):
    x = x + plain_self_attention(block.attn, block.norm1(x))
    return x + plain_mlp(block.mlp, block.norm2(x))


PLAIN = {"adaln": plain_adaln, "cross_attention": plain_cross_attention, "in_context": plain_in_context}


def composed(model, x, t, y):
    """The model as the paper describes it, with every Linear called as a module; also the tokens after each block."""
    kind, final, hidden = model.conditioning, model.final_layer, []
    x = model.x_embedder(x) + model.pos_embed
    t, y, n = model.t_embedder(t), model.y_embedder(y, False), x.shape[1]
    c = t + y if kind == "adaln" else torch.stack([t, y], 1)
    x = torch.cat([x, c], 1) if kind == "in_context" else x
    for block in model.blocks:
        x = PLAIN[kind](block, x, c)
        hidden.append(x[:, :n])
    h = final.norm_final(hidden[-1])
    h = modulate(h, *final.adaLN_modulation(c).chunk(2, dim=1)) if kind == "adaln" else h
    return model.unpatchify(final.linear(h)), hidden


@pytest.mark.parametrize(
    "kind, millions", [("adaln_zero", 675), ("adaln", 600), ("cross_attention", 598), ("in_context", 449)]
)
def test_published_parameters_of_xl_2(kind, millions):
    with torch.device("meta"):
        model = DiT_models["DiT-XL/2"](conditioning=kind)
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6) == millions
    assert {type(b) for b in model.blocks} == {CONDITIONINGS[kind].block} and model.conditioning == kind


def test_default_is_adaln_zero():
    model = DiT(input_size=4, hidden_size=8, depth=1, num_heads=2)
    assert model.conditioning == "adaln_zero" and type(model.blocks[0]) is DiTBlock
    assert ditfast.InContextBlock is CONDITIONINGS["in_context"].block


def test_unknown_conditioning():
    with pytest.raises(ValueError, match="conditioning must be one of .*, got 'cross'; did you mean 'cross_att"):
        DiT(input_size=4, hidden_size=8, depth=1, num_heads=2, conditioning="cross")


@others
def test_equals_the_plain_composition(kit, kind):
    """Three samples with different rows: output, tokens of every block, and gradients."""
    model, (x, t, y) = kit.tiny(conditioning=kind), kit.batch()
    x.requires_grad_()
    out, hidden = model(x, t, y, return_hidden=range(3))
    expected, expected_hidden = composed(model, x, t, y)
    kit.close(out, expected, 2e-6)
    for got, want in zip(hidden, expected_hidden, strict=True):
        kit.close(got, want, 2e-6)
    kit.close(kit.gradients(model, out, x), kit.gradients(model, expected, x), 1e-5)
    for i in range(3):
        kit.close(model(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], out[i], 5e-6)


@others
def test_kernels_match_the_reference(kit, kind):
    model, (x, t, y) = kit.tiny(conditioning=kind, depth=1), kit.batch(2)
    results = []
    for names in (("reference",), ("host",)):
        with contextlib.ExitStack() as stack, record() as ran:
            for name in names:
                stack.enter_context(use_backend(name))
            out = model(x.requires_grad_(), t, y)
            results.append({"out": out, **kit.gradients(model, out, x)})
    kit.close(results[1], results[0], 1e-5)
    assert ran.keys() == IN_ALL | ({"layer_norm_modulate"} if kind == "adaln" else set())
    assert {name for names in ran.values() for name in names} == {"host"}


@every
def test_gradients_reach_every_parameter(kit, kind):
    model, inputs = kit.tiny(conditioning=kind), kit.batch()
    grads = kit.gradients(model, model(*inputs))
    assert grads.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, grad in grads.items():
        assert grad.isfinite().all() and grad.any(), name


@every
def test_initial_output_is_zero_and_only_adaln_zero_starts_closed(kind):
    torch.manual_seed(0)
    model = DiT(input_size=8, hidden_size=32, depth=2, num_heads=2, conditioning=kind)
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), torch.tensor([3, 4])
    out, (first, last) = model(x, t, y, return_hidden=[0, 1])
    assert not out.any() and torch.equal(first, last) == (kind == "adaln_zero")
    modulation = [p.any() for n, p in model.named_parameters() if n.endswith("adaLN_modulation.1.weight")]
    assert all(modulation) if kind == "adaln" else not any(modulation)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm) and m.weight is not None]
    assert all(norm.weight.eq(1).all() and not norm.bias.any() for norm in norms)
    assert len(norms) == {"cross_attention": 7, "in_context": 5}.get(kind, 0)


@every
def test_training_decreases_the_loss(kind):
    """An image's class determines its sign, so the model must read the label."""
    torch.manual_seed(0)
    model = DiT(4, 2, 1, 32, 2, 2, num_classes=2, class_dropout_prob=0.0, learn_sigma=False, conditioning=kind)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    x, t, y = torch.randn(16, 1, 4, 4), torch.randint(1000, (16,)), torch.arange(16) % 2
    target = x * (2.0 * y - 1)[:, None, None, None]
    losses = []
    for _ in range(60):
        loss = (model(x, t, y) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@others
@torch.no_grad()
def test_guidance(kit, kind):
    model, (x, t, y) = kit.tiny(conditioning=kind), kit.batch(4)
    cond, uncond = model(torch.cat([x[:2], x[:2]]), t, y).chunk(2)
    guided = (uncond + 2.5 * (cond - uncond))[:, :3]
    out = model.forward_with_cfg(x, t, y, 2.5)
    kit.close(out[:, :3], torch.cat([guided, guided]), 1e-6)


@others
@pytest.mark.parametrize("implementation", CheckpointImpl)
def test_checkpointed(kit, kind, implementation):
    plain, model, inputs = kit.tiny(conditioning=kind), kit.tiny(conditioning=kind), kit.batch()
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, checkpoint_impl=implementation)
    for m in (plain, model):
        m(inputs[0].clone().requires_grad_(), *inputs[1:]).square().sum().backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        if p.requires_grad:
            kit.close(p.grad, q.grad, 1e-5)


@others
def test_compiled(kit, kind):
    torch.compiler.reset()
    model, (x, t, y) = kit.tiny(conditioning=kind, depth=1), kit.batch()
    x.requires_grad_()
    out = torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, y)
    expected = model(x, t, y)
    kit.close(out, expected, 5e-6)
    kit.close(kit.gradients(model, out, x), kit.gradients(model, expected, x), 1e-5)


@others
@torch.no_grad()
def test_autocast_copies_and_the_models_backend(kit, kind):
    model, inputs = kit.tiny(conditioning=kind, backend="reference"), kit.batch()
    with record() as ran:
        expected = model(*inputs)
    assert {name for names in ran.values() for name in names} == {"reference"}
    ema = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        out, (tokens,) = model(*inputs, return_hidden=[1])
    assert tokens.dtype == torch.float32 and out.dtype == torch.bfloat16  # the residual stream keeps its precision
    kit.close(out.float(), expected, 0.03)
    for p in model.parameters():
        p.zero_()
    kit.close(ema(*inputs), expected, 1e-6)


@others
@pytest.mark.parametrize("path", ["norm1", "attn", "mlp", "attn.qkv", "mlp.fc1", "mlp.act"])
@torch.no_grad()
def test_hooks_take_effect(kit, kind, path):
    model, inputs = kit.tiny(conditioning=kind), kit.batch()
    before = model(*inputs)
    model.blocks[1].get_submodule(path).register_forward_hook(lambda module, args, out: 2 * out)
    changed = model(*inputs)
    assert (changed - before).abs().max() > 1e-4 * before.abs().max()
    if path not in ("attn", "mlp"):
        kit.close(changed, composed(model, *inputs)[0], 2e-6)
