"""Embedders and layers that are replaced, wrapped or stored in another dtype work as in the original."""

import pytest
import torch
import torch.nn as nn

from ditfast.models import DiT, PatchEmbed, TimestepEmbedder
from ditfast.ops.backends.choice import use_backend
from ditfast.ops.backends.log import record

FP8 = torch.float8_e4m3fn


def assert_original(kit, model, x, t, y):
    kit.close(model(x, t, y), kit.original(model, x, t, y), 5e-6)


class Shifted(nn.Module):
    """A Linear with an 8-bit weight that is used in the input's dtype."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(FP8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def rounded(model):
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data = layer.weight.data.to(FP8).to(layer.weight.dtype)
    return model


def in_eight_bits(model):
    """Replace every Linear."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear):
                setattr(parent, name, Shifted(child))
    return model


def cast_around_calls(model):
    """Keep every Linear's weight in eight bits, except during its call, by hooks."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            dtype = layer.weight.dtype
            layer.register_forward_pre_hook(lambda m, args, d=dtype: setattr(m.weight, "data", m.weight.data.to(d)))
            layer.register_forward_hook(lambda m, args, out: setattr(m.weight, "data", m.weight.data.to(FP8)))
            layer.weight.data = layer.weight.data.to(FP8)
    return model


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("stored", (in_eight_bits, cast_around_calls))
def test_weights_stored_in_eight_bits(kit, stored, dtype):
    x, t, y = kit.batch()
    with torch.no_grad():
        expected = rounded(kit.tiny().to(dtype))(x.to(dtype), t, y)
        kit.close(stored(kit.tiny().to(dtype))(x.to(dtype), t, y), expected, 1e-6 if dtype == torch.float32 else 0.03)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantization(kit):
    model = torch.ao.quantization.quantize_dynamic(kit.tiny(), {nn.Linear}, dtype=torch.qint8)
    x, t, y = kit.batch()
    with torch.no_grad():
        kit.close(model(x, t, y), kit.original(model, x, t, y), 0.01)  # quantized inputs amplify rounding
        kit.close(model(x, t, y), kit.tiny()(x, t, y), 0.1)


def test_replica_of_data_parallel(kit):
    """A replica's parameters are plain attributes, and ``parameters()`` is empty."""

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        replica._modules = {name: replicate(child) for name, child in module._modules.items()}
        for name, p in module._parameters.items():
            setattr(replica, name, p if p is None else p.view_as(p))
        return replica

    model, (x, t, y) = kit.tiny(), kit.batch()
    replica = replicate(model)
    assert not list(replica.parameters())
    kit.close(replica(x, t, y), model(x, t, y), 1e-6)
    replica(x, t, y).sum().backward()
    assert model.t_embedder.mlp[0].weight.grad.any()


def test_only_time_features(kit):
    embedder, t = kit.fill(TimestepEmbedder(16)), torch.tensor([0.5, 999.0])
    kit.close(in_eight_bits(embedder)(t), rounded(kit.fill(TimestepEmbedder(16)))(t), 1e-6)
    for change in (lambda embedder: embedder, in_eight_bits):  # the second has bfloat16 biases
        assert change(kit.fill(TimestepEmbedder(16)).bfloat16())(t).dtype == torch.bfloat16


class Features(nn.Module):
    """Text features (B, 12) or several labels (B, 3) instead of one label."""

    def __init__(self):
        super().__init__()
        self.proj, self.table = nn.Linear(12, 32), nn.Embedding(9, 32)

    def forward(self, y, train):
        return self.proj(y) if y.is_floating_point() else self.table(y).mean(1)


class Interval(nn.Module):
    """Two times (t, r) instead of one."""

    def __init__(self):
        super().__init__()
        self.t, self.r = TimestepEmbedder(32), TimestepEmbedder(32)

    def forward(self, times):
        t, r = times
        return self.t(t) + self.r(t - r)


class Nothing(nn.Module):
    def forward(self, y, train):
        return torch.zeros(1, 32)


@pytest.mark.parametrize("y", (torch.linspace(-1, 1, 36).view(3, 12), torch.arange(9).view(3, 3)))
def test_other_conditions(kit, y):
    model, (x, t, _) = kit.tiny(), kit.batch()
    model.y_embedder = kit.fill(Features())
    assert_original(kit, model, x, t, y)


def test_two_times(kit):
    model, (x, t, y) = kit.tiny(), kit.batch()
    model.t_embedder = kit.fill(Interval())
    assert_original(kit, model, x, (t, t - 10), y)


@pytest.mark.parametrize("conditioning", ("adaln_zero", "adaln", "cross_attention", "in_context"))
def test_one_row_stands_for_all_samples(kit, conditioning):
    model, (x, t, y) = kit.tiny(conditioning=conditioning), kit.batch()
    for one_t, one_y in ((t[:1], y), (t, y[:1]), (t[:1], y[:1])):
        kit.close(model(x, one_t, one_y), model(x, one_t.expand(3), one_y.expand(3)), 5e-6)
    model.y_embedder = Nothing()
    kit.close(model(x, t[:1], None), model(x, t[:1].expand(3), None), 5e-6)


def test_one_row_only_for_layers(kit):
    model, x, c = kit.tiny(), kit.arr("tokens", (3, 5, 32)), kit.arr("c", (1, 32)).requires_grad_()
    for layer in (model.blocks[0], model.final_layer):
        outs = [layer(x, c), layer(x, c.expand(3, 32))]
        kit.close(*outs, 2e-6)
        kit.close(*(torch.autograd.grad((out * out.detach().cos()).sum(), c)[0] for out in outs), 5e-6)


class Foreign(nn.Module):
    """Another patch embedder, which does not reveal its size."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 32, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x).flatten(2).mT


PROJECTIONS = {
    "nine channels": nn.Conv2d(9, 32, 2, 2),
    "overlapping": nn.Conv2d(4, 32, 3, 2, padding=1),
    "shifted": nn.Conv2d(4, 32, 2, 2, padding=1),  # 36 tokens
    "dilated": nn.Conv2d(4, 32, 2, 2, dilation=2, padding=1),
    "grouped": nn.Conv2d(4, 32, 2, 2, groups=2),
    "pixels": nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(16, 32, 1)),
}


@pytest.mark.parametrize("name", PROJECTIONS)
def test_other_projections(kit, name):
    proj = kit.fill(PROJECTIONS[name])
    model, (_, t, y) = kit.tiny(), kit.batch()
    model.x_embedder.proj = proj
    x = kit.arr("image", (3, getattr(proj, "in_channels", 4), 10, 10))
    if name == "shifted":
        model.pos_embed = nn.Parameter(kit.arr("pos", (1, 36, 32)))
    assert_original(kit, model, x, t, y)


@pytest.mark.parametrize("shape", ((1, 1, 32), (3, 25, 32)))
def test_other_positions(kit, shape):
    model = kit.tiny()
    model.pos_embed = nn.Parameter(kit.arr("pos", shape))
    assert_original(kit, model, *kit.batch())


def test_norm_over_tokens_too(kit):
    model = kit.tiny()
    model.blocks[1].norm1 = model.blocks[2].norm2 = nn.LayerNorm((25, 32), elementwise_affine=False)
    assert_original(kit, model, *kit.batch())


def test_other_patch_embedder(kit):
    model, (_, t, y) = kit.tiny(), kit.batch()
    model.x_embedder = kit.fill(Foreign(5))
    assert_original(kit, model, kit.arr("image", (3, 5, 10, 10)), t, y)
    model.x_embedder = kit.fill(PatchEmbed(10, 2, 5, 32))
    assert_original(kit, model, kit.arr("image", (3, 5, 10, 10)), t, y)


def test_labels_are_embedded_last(kit):
    """Modules that draw random numbers before them still draw first, as in the original."""
    model, (x, t, y) = DiT(input_size=10, hidden_size=32, depth=1, num_heads=2, class_dropout_prob=0.5), kit.batch()
    order = []
    for name in ("x_embedder", "t_embedder", "y_embedder"):
        model.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: order.append(n))
    model(x, t, y)
    assert order == ["x_embedder", "t_embedder", "y_embedder"]


class Forwarding(nn.Module):
    """A wrapper that forwards attributes and accepts only tensors."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args):
        assert all(isinstance(a, torch.Tensor) for a in args)
        return self.inner(*args)


def wrapped(module):
    return Forwarding(module)


def wrapped_and_checkpointed(module):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    return checkpoint_wrapper(Forwarding(checkpoint_wrapper(module)))


@pytest.mark.parametrize("wrap", (wrapped, wrapped_and_checkpointed))
@pytest.mark.parametrize("conditioning", ("adaln_zero", "cross_attention"))
def test_wrapped_layers_get_tokens(kit, wrap, conditioning):
    model, (x, t, y) = kit.tiny(conditioning=conditioning), kit.batch()
    out = model(x, t, y)
    expected = kit.gradients(model, out)
    model.blocks[1], model.final_layer = wrap(model.blocks[1]), wrap(model.final_layer)
    got = model(x, t, y)
    kit.close(got, out, 2e-6)
    grads = kit.gradients(model, got)
    kit.close(dict(zip(expected, grads.values(), strict=True)), expected, 5e-6)


@pytest.mark.parametrize("conditioning", ("adaln_zero", "adaln"))
def test_wrapped_layers_run_on_the_backend_of_the_model(kit, conditioning):
    model = kit.tiny(depth=1, conditioning=conditioning, backend="reference")
    model.blocks[0] = Forwarding(model.blocks[0])
    with use_backend("sdpa"), record() as ran:
        model(*kit.batch())
    assert {name for names in ran.values() for name in names} == {"reference"}


def test_hooks_inside_a_wrapper_see_tokens(kit):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, (x, t, y), seen = kit.tiny(), kit.batch(), []
    expected = model(x, t, y)
    model.blocks[1].register_forward_hook(lambda m, args, out: seen.extend((*args, out)))
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    with torch.no_grad():
        kit.close(model(x, t, y), expected, 2e-6)
    assert [type(value) for value in seen] == [torch.Tensor] * 3
    assert seen[0].shape == seen[2].shape == (3, 25, 32)


@pytest.mark.parametrize("name", ("attn", "mlp", "attn.qkv", "mlp.fc1", "norm1", "adaLN_modulation"))
def test_wrapped_parts(kit, name):
    model, batch = kit.tiny(), kit.batch()
    expected, (parent, _, child) = model(*batch), name.rpartition(".")
    owner = model.blocks[1].get_submodule(parent)
    setattr(owner, child, Forwarding(getattr(owner, child)))
    kit.close(model(*batch), expected, 2e-6)
