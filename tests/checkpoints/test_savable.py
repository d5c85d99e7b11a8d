"""What is saved is loaded as the same function; a model that cannot be is refused before anything is written."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from ditfast import DiT, LabelEmbedder
from ditfast.checkpoints import to_diffusers


class Adapted(nn.Module):
    """A Linear with a low-rank adapter."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear
        self.down, self.up = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Square(nn.Module):
    def forward(self, x):
        return x * x


def adapt(model):
    model.blocks[1].attn.proj = Adapted(model.blocks[1].attn.proj)


def drop_block(model):
    model.blocks = model.blocks[:1]


def change_labels(model):
    model.y_embedder = LabelEmbedder(9, 32, 0.1)


def move_null_label(model):
    model.y_embedder = LabelEmbedder(6, 32, 0.0)  # as many rows


def change_heads(model):
    model.blocks[1].attn.num_heads, model.blocks[1].attn.head_dim = 2, 16


def change_eps(model):
    model.blocks[0].norm2.eps = 0.1


def change_scale(model):
    model.blocks[0].attn.scale = 0.5


def change_time(model):
    model.t_embedder.freq_shift = 1


def change_activation(model):
    model.blocks[0].mlp.act = Square()


def change_gelu(model):
    model.blocks[0].mlp.act = nn.GELU()


def quantize(model):
    model.blocks[0].mlp.fc1.weight = nn.Parameter(torch.ones(128, 32, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    "change, said",
    [
        (
            adapt,
            r"blocks.1.attn.proj.weight is missing in the model, \(32, 32\) float32 in what it builds; 7 more differ",
        ),
        (drop_block, "blocks.1.attn.qkv.weight is missing in the model"),
        (
            change_labels,
            r"y_embedder.\S+weight is \(10, 32\) float32 in the model, \(6, 32\) float32 in what it",
        ),
        (move_null_label, "y_embedder.num_classes is 6 in the model, 5 in what it builds"),
        (change_heads, "blocks.1.attn.num_heads is 2 in the model, 4 in what it builds"),
        (change_eps, "blocks.0.norm2.eps is 0.1 in the model, 1e-06 in what it builds"),
        (change_scale, "blocks.0.attn.scale is 0.5 in the model, 0.35"),
        (change_time, "t_embedder.freq_shift is 1 in the model, 0 in what it builds"),
        (change_activation, "blocks.0.mlp.act is a Square in the model, a GELU in what it builds"),
        (change_gelu, "blocks.0.mlp.act.approximate is 'none' in the model, 'tanh' in what it builds"),
        (quantize, r"blocks.0.mlp.fc1.weight is \(128, 32\) int8 in the model"),
    ],
)
def test_another_model_than_its_config(kit, tmp_path, change, said):
    model = kit.tiny()
    change(model)
    with pytest.raises(
        ValueError, match=f"model.config must build the model for it to be saved, but {said}"
    ) as error:
        model.save_pretrained(tmp_path / "x")
    assert "merge adapters such as LoRA first, or build the DiT with arguments" in str(error.value)
    (rescued,) = (tmp_path / "x").iterdir()
    assert str(error.value).endswith(f"; its weights are now in {rescued}")
    saved, state = load_file(rescued), model.state_dict()
    assert saved.keys() == state.keys() and all(torch.equal(saved[name], state[name]) for name in saved)


@torch.no_grad()
def test_what_does_not_change_the_function_is_saved(kit, tmp_path):
    """Wrappers of blocks, whose names are stripped; dropout; hooks."""
    model, batch = kit.tiny(), kit.batch()
    expected = model(*batch)
    model.blocks[0].attn.attn_drop = torch.nn.Dropout(0.1)
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model.final_layer.register_forward_hook(lambda *_: None)
    model.y_embedder.dropout_prob = 0.5
    model.save_pretrained(tmp_path / "x")
    loaded = DiT.from_pretrained(tmp_path / "x")
    kit.same(loaded, kit.tiny())
    assert torch.equal(loaded(*batch), expected)


def test_subclasses(kit, tmp_path):
    """Their own constructor says what belongs to the model; arguments of their own are for `from_pretrained`."""

    class Wider(DiT):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.extra = nn.Linear(2, 2)

    class Wide(DiT):
        def __init__(self, *, width=2, **kwargs):
            super().__init__(**kwargs)
            self.extra = nn.Linear(width, 2)

    model = Wider(**kit.TINY)
    model.save_pretrained(tmp_path / "wider")
    assert torch.equal(Wider.from_pretrained(tmp_path / "wider").extra.weight, model.extra.weight)
    adapt(model)
    with pytest.raises(ValueError, match="blocks.1.attn.proj.weight is missing in the model"):
        model.save_pretrained(tmp_path / "adapted")
    Wide(width=3, **kit.TINY).save_pretrained(tmp_path / "wide")
    assert Wide.from_pretrained(tmp_path / "wide", width=3).extra.in_features == 3


def test_conversion_needs_all_weights_and_no_more(kit):
    model = kit.tiny()
    adapt(model)
    with pytest.raises(
        ValueError, match="do not fit the config: blocks.1.attn.proj.weight is missing in the weights"
    ):
        to_diffusers(model.config, model.state_dict())
