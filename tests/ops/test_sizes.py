"""Registered operations called by name: wrong sizes are errors before a kernel gets pointers."""

import pytest
import torch
from ops.registered import available, registered_calls
from ops.test_bad_input import OPS

from ditfast.ops.backends import availability

FREE = {  # sizes that need not match anything else
    ("layer_norm_modulate", "x", 1),
    ("mlp_inference", "h", 0),
    ("mlp_inference", "h", 1),
    ("mlp", "h", 0),
    ("mlp", "h", 1),
    ("attention", "qkv", 0),
    ("attention", "qkv", 1),
    ("qkv_attention", "h", 0),
    ("qkv_attention", "h", 1),
    ("attention_backward", "lse", 1),
    ("qkv_attention_backward", "lse", 1),
    ("patchify", "x", 0),
    ("patchify", "x", 1),
    ("unpatchify", "tokens", 0),
    ("patch_embed", "x", 0),
}


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_size(op):
    tried, taken = 0, []
    for registered, args in registered_calls(op, available(op)).items():
        name = registered.name().removeprefix("ditfast::")
        for i, argument in enumerate(registered._schema.arguments):
            if not isinstance(args[i], torch.Tensor):
                continue
            for dim in range(args[i].dim()):
                wrong = [*args]
                wrong[i] = args[i].narrow(dim, 0, args[i].shape[dim] - 1).clone()
                if (name, argument.name, dim) in FREE:
                    continue
                tried += 1
                try:
                    with torch.no_grad():
                        registered(*wrong)
                except (ValueError, RuntimeError):
                    continue
                taken.append((name, argument.name, dim))
    assert tried and not taken


@pytest.mark.skipif(not availability._installed["ditfast._C"], reason="the extension is not built")
@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("lse", lambda t: t.half(), TypeError, "lse must be float32, got torch.float16"),
        ("dout", lambda t: t.half(), TypeError, "dout must be float32, got torch.float16"),
        ("out", lambda t: t[:, :1].expand_as(t), ValueError, "out must be contiguous, got strides"),
        (
            "dout",
            lambda t: t[:, :2],
            ValueError,
            r"dout must have shape \(B, N, E\) = \(2, 4, 128\), got \(2, 2, 128\)",
        ),
        ("dout", lambda t: t[0], ValueError, r"dout must have shape \(B, N, E\), got \(4, 128\)"),
    ],
)
def test_message(name, change, error, words):
    op = torch.ops.ditfast.attention_backward.default
    args = list(registered_calls("attention", "host")[op])
    i = [argument.name for argument in op._schema.arguments].index(name)
    args[i] = change(args[i])
    with pytest.raises(error, match=f"attention_backward: {words}"):
        op(*args)
