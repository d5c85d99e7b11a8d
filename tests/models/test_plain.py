"""Changes to a submodule after a first call take effect in the next one: nothing about it is remembered."""

import pytest
import torch
import torch.nn as nn
from torch.nn.utils import parametrize

from ditfast.models import AdaLNBlock, DiT, DiTBlock, FinalLayer, modulate
from ditfast.models.plain import _ORIGINAL, is_plain

PARTS = (
    "norm1",
    "norm2",
    "attn",
    "attn.qkv",
    "attn.proj",
    "mlp",
    "mlp.fc1",
    "mlp.fc2",
    "mlp.act",
    "adaLN_modulation.0",
)
LINEARS = [name for name in PARTS if name.split(".")[-1] in ("qkv", "proj", "fc1", "fc2")]


class Doubled(nn.Module):
    def forward(self, t):
        return 2 * t


class WithLora(nn.Linear):
    """A Linear with a rank-one update."""

    def forward(self, t):
        return super().forward(t) + t.mean(-1, keepdim=True)


def filled(module):
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    return module


@pytest.fixture
def block():
    return filled(DiTBlock(16, 2))


def run(block):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return block(torch.randn(2, 5, 16, generator=generator), torch.randn(2, 16, generator=generator))


def assert_changed(block, change):
    before = run(block)
    change()
    assert not torch.allclose(run(block), before, rtol=1e-3)


@pytest.mark.parametrize("name", PARTS)
def test_a_hook(block, name):
    hook = lambda module, args, out: 2 * out  # noqa: E731
    assert_changed(block, lambda: block.get_submodule(name).register_forward_hook(hook))


@pytest.mark.parametrize("name", PARTS)
def test_a_global_hook(block, name):
    module = block.get_submodule(name)
    hook = lambda m, args, out: 2 * out if m is module else None  # noqa: E731
    handles = []
    try:
        assert_changed(block, lambda: handles.append(nn.modules.module.register_module_forward_hook(hook)))
    finally:
        handles[0].remove()


@pytest.mark.parametrize("name", PARTS)
def test_a_forward_on_the_instance(block, name):
    module = block.get_submodule(name)
    original = module.forward
    assert_changed(block, lambda: setattr(module, "forward", lambda *a, **k: 2 * original(*a, **k)))


@pytest.mark.parametrize("name", PARTS)
def test_a_forward_on_the_class(block, name, monkeypatch):
    module = block.get_submodule(name)
    original = type(module).forward

    def doubled(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        return 2 * out if self is module else out

    assert_changed(block, lambda: monkeypatch.setattr(type(module), "forward", doubled))


@pytest.mark.parametrize("home", ("ditfast.models", "ditfast.models.carry"))
@pytest.mark.parametrize("kind", (DiTBlock, AdaLNBlock, FinalLayer))
def test_a_modulate(kind, home, monkeypatch):
    block = filled(kind(16, 2, 4))
    assert_changed(block, lambda: monkeypatch.setattr(f"{home}.modulate", lambda x, *rows: 2 * modulate(x, *rows)))


@pytest.mark.parametrize("kind", (DiTBlock, FinalLayer))
def test_a_forward_of_all_blocks(kind, monkeypatch):
    """A patch with the original's signature receives tokens."""
    model = filled(DiT(input_size=4, hidden_size=16, depth=2, num_heads=2)).eval()
    inputs = torch.ones(2, 4, 4, 4), torch.tensor([1, 900]), torch.tensor([3, 4])
    with torch.no_grad():
        before, original = model(*inputs), kind.forward

        def doubled(self, x, c):
            assert type(x) is torch.Tensor
            return 2 * original(self, x, c)

        monkeypatch.setattr(kind, "forward", doubled)
        assert not torch.allclose(model(*inputs), before, rtol=1e-3)


@pytest.mark.parametrize("training", (False, True))
def test_attention_weights(block, training):
    """As in timm, without the fused form they pass through ``attn_drop``, where hooks can read and change them."""
    attn, x, seen = block.attn.train(training), torch.linspace(-1, 1, 160).view(2, 5, 16), []
    attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(out))
    fused = attn(x)
    assert not seen
    attn.fused_attn = False
    torch.testing.assert_close(attn(x), fused)
    (weights,) = seen
    assert weights.shape == (2, 2, 5, 5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))
    v = attn.qkv(x)[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)  # (B, H, N, d)
    torch.testing.assert_close(attn.proj((weights @ v).transpose(1, 2).flatten(2)), fused)


def test_another_dropout_of_attention_weights(block):
    assert_changed(block, lambda: setattr(block.attn, "attn_drop", Doubled()))


@pytest.mark.parametrize("name", LINEARS)
def test_a_parametrization(block, name):
    assert_changed(
        block, lambda: parametrize.register_parametrization(block.get_submodule(name), "weight", Doubled())
    )


@pytest.mark.parametrize("name", LINEARS)
def test_a_lora(block, name):
    parent, _, child = name.rpartition(".")
    old = block.get_submodule(name)
    new = WithLora(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    assert_changed(block, lambda: setattr(block.get_submodule(parent), child, new))


@pytest.mark.parametrize("name", PARTS)
def test_an_undone_change_is_plain_again(block, name):
    module = block.get_submodule(name)
    handle = module.register_forward_hook(lambda *_: None)
    assert not is_plain(module, type(module))
    handle.remove()
    assert is_plain(module, type(module))


def test_the_forward_of_every_fused_class_is_known():
    assert all(_ORIGINAL.values())
