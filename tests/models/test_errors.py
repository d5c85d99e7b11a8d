"""Bad input: one error that names the argument, the rule and the value."""

import re

import numpy as np
import pytest
import torch

from ditfast.models import DiT, DiT_models, DiTBlock

SMALL = dict(input_size=8, hidden_size=32, depth=1, num_heads=2)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"patch_size": 3}, "patch_size must divide input_size=8, got 3"),
        ({"num_heads": 5}, "num_heads must divide hidden_size=32, got 5"),
        ({"hidden_size": 30}, "hidden_size must be a multiple of 4, got 30"),
        ({"backend": "cudnn"}, "backend must be one of .*, got 'cudnn'"),
        ({"backend": 3}, "backend must be a string, got 3"),
        ({"conditioning": []}, r"conditioning must be a string, got \[\]"),
        ({"depth": 10**9}, r"depth must be an integer in \[0, 1024\], got 1000000000"),
        ({"depth": True}, "depth must be an integer .*, got True"),
        ({"num_heads": -2}, "num_heads must be an integer .*, got -2"),
        ({"patch_size": 0}, "patch_size must be an integer .*, got 0"),
        ({"input_size": (8, 8, 8)}, r"input_size must be one integer or two, got \(8, 8, 8\)"),
        ({"input_size": 2**16, "patch_size": 1}, "input_size=65536 .* makes 4294967296 tokens of hidden_size=32"),
        ({"hidden_size": "32"}, "hidden_size must be an integer .*, got '32'"),
        ({"num_classes": 1e3}, "num_classes must be an integer .*, got 1000.0"),
        ({"mlp_ratio": 0}, r"mlp_ratio must be a number in \(0, 1024\], got 0"),
        ({"mlp_ratio": 1 / 64}, "mlp_ratio must give the MLP a width"),
        ({"norm2_eps": float("nan")}, "norm2_eps must be a number .*, got nan"),
        ({"class_dropout_prob": 2}, "class_dropout_prob must be a number .*, got 2"),
        ({"timestep_freq_shift": 128}, "timestep_freq_shift must be a number .*, got 128"),
        ({"learn_sigma": 3}, "learn_sigma must be true or false, got 3"),
    ],
)
def test_constructor(changes, message):
    with pytest.raises(ValueError, match=message):
        DiT(**{**SMALL, **changes})


def test_block_argument():
    with pytest.raises(TypeError, match="unknown argument 'qk_scale'; it takes hidden_size"):
        DiTBlock(32, 2, qk_scale=1.0)


def test_preset():
    with pytest.raises(KeyError, match=r"model must be one of .*, got 'DiT-XL-2'; did you mean 'DiT-XL/2'\?"):
        DiT_models["DiT-XL-2"]


X, T, Y = (3, 4, 8, 8), torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"t": [1, 2, 3]}, TypeError, "t must be a tensor, got list"),
        ({"y": 4}, TypeError, "y must be a tensor, got int"),
        ({"return_hidden": 0}, TypeError, "return_hidden must be a list of blocks, got int"),
        ({"return_hidden": ["0"]}, ValueError, r"return_hidden must hold blocks in \[0, 0\], got '0'"),
        ({"x": torch.zeros(3, 4, 64)}, ValueError, r"x must have shape .* = \(B, 4, 8, 8\), got \(3, 4, 64\)"),
        ({"x": torch.zeros(3, 3, 8, 8)}, ValueError, r"x must have shape .*, got \(3, 3, 8, 8\)"),
        ({"x": torch.zeros(3, 4, 16, 16)}, ValueError, r"x must have shape .*, got \(3, 4, 16, 16\)"),
        (
            {"x": torch.zeros(X, dtype=torch.float16)},
            TypeError,
            "x must have the model's dtype torch.float32 .*float16",
        ),
        ({"x": np.zeros(X, "float32")}, TypeError, "x must be a tensor, got ndarray"),
        ({"t": 1}, TypeError, "t must be a tensor, got int"),
        ({"y": None}, TypeError, "y must be a tensor, got NoneType"),
        ({"t": torch.tensor([1, 2])}, ValueError, r"t must have shape \(B,\) = \(3,\), got \(2,\)"),
        ({"t": torch.tensor(1)}, ValueError, r"t must have shape \(B,\) = \(3,\), got \(\)"),
        ({"t": torch.ones(3, dtype=torch.bool)}, TypeError, "t must be floating-point or integer, got torch.bool"),
        ({"t": T.to("meta")}, ValueError, "t must be on the device of x, cpu, got meta"),
        ({"y": torch.zeros(3, 1).long()}, ValueError, r"y must have shape \(B,\) = \(3,\), got \(3, 1\)"),
        ({"y": Y.float()}, TypeError, "y must be int64 or int32, got torch.float32"),
        ({"y": Y + 995}, IndexError, r"y must be in \[0, 1000\], got values from 999 to 1001"),
        ({"y": Y - 5}, IndexError, r"y must be in \[0, 1000\], got values from -1 to 1"),
        ({"return_hidden": [1]}, ValueError, r"return_hidden must hold blocks in \[0, 0\], got 1"),
    ],
)
def test_forward(change, error, message):
    inputs = {"x": torch.zeros(X), "t": T, "y": Y, **change}
    with pytest.raises(error, match=message):
        DiT(**SMALL).eval()(**inputs)


def test_null_label_that_does_not_exist():
    model = DiT(**SMALL, class_dropout_prob=0.0)
    with pytest.raises(IndexError, match=r"y must be in \[0, 999\]"):
        model(torch.zeros(X), T, torch.full((3,), 1000))


def test_guidance():
    model = DiT(**SMALL).eval()
    with pytest.raises(ValueError, match="x must have an even batch"):
        model.forward_with_cfg(torch.zeros(X), T, Y, 4.0)
    with pytest.raises(ValueError, match=r"cfg_channels must be in \[0, 8\], got 9"):
        model.forward_with_cfg(torch.zeros(2, 4, 8, 8), T[:2], Y[:2], 4.0, cfg_channels=9)


@pytest.mark.parametrize(
    "name, value", [("cfg_scale", None), ("cfg_scale", float("nan")), ("cfg_scale", [2.0]), ("cfg_channels", 2.5)]
)
def test_guidance_that_is_not_a_number(name, value):
    arguments = {"x": torch.zeros(2, 4, 8, 8), "t": T[:2], "y": Y[:2], "cfg_scale": 2.0, name: value}
    with pytest.raises(ValueError, match=f"{name} must be .*, got {re.escape(str(value))}"):
        DiT(**SMALL).forward_with_cfg(**arguments)


@pytest.mark.parametrize("shape", [(8,), (1,), (4,), (2, 1), (2, 1, 1), (1, 1, 1, 8), (2, 1, 1, 8)])
def test_guidance_of_neither_one_nor_every_sample(shape):
    """Two samples of width 8: none of these is a scale per sample, though most of them broadcast."""
    x, t, y = torch.zeros(4, 4, 8, 8), T[:1], Y[:1]
    rule = re.escape(f"have shape (), (B,) or (B, 1, 1, 1), B = 2 the half of x's batch, got {shape}")
    with pytest.raises(ValueError, match=f"cfg_scale must be a number or {rule}"):
        DiT(**SMALL).forward_with_cfg(x, t, y, torch.ones(shape))


def test_the_meta_device_computes_no_position():
    with torch.device("meta"):
        assert DiT(**{**SMALL, "input_size": 2048, "depth": 0}).pos_embed.shape == (1, 1024**2, 32)


def test_unpatchify_needs_a_square():
    with pytest.raises(ValueError, match=r"x must have a square number of tokens, got shape \(1, 15, 32\)"):
        DiT(**SMALL).unpatchify(torch.zeros(1, 15, 32))


def test_backend_that_cannot_run(monkeypatch):
    monkeypatch.setattr("ditfast.ops.backends.choice.why_not", lambda op, name, device: "it is not there")
    model = DiT(**SMALL, backend="triton")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: it is not there"):
        model(torch.zeros(X), T, Y)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("make", [lambda v: torch.nested.nested_tensor([*v]), torch.Tensor.to_sparse])
def test_no_dense_tensor(make):
    """One error before a module sees it, for the model and for its layers called by themselves."""
    model = DiT(**SMALL).eval()
    x, tokens, c = torch.zeros(X), torch.zeros(3, 16, 32), torch.zeros(3, 32)
    for name, call in (
        ("x", lambda: model(make(x), T, Y)),
        ("t", lambda: model(x, make(T), Y)),
        ("y", lambda: model(x, T, make(Y))),
        ("x", lambda: model.forward_with_cfg(make(x), T, Y, 2.0)),
        ("x", lambda: model.unpatchify(make(tokens))),
        ("x", lambda: model.blocks[0](make(tokens), c)),
        ("c", lambda: model.blocks[0](tokens, make(c))),
        ("x", lambda: model.final_layer(make(tokens), c)),
        ("c", lambda: model.final_layer(tokens, make(c))),
        ("h", lambda: model.blocks[0].attn(make(tokens))),
        ("h", lambda: model.blocks[0].mlp(make(tokens))),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, torch.strided, got "):
            call()
