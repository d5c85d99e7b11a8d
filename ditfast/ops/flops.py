"""What PyTorch's FlopCounterMode counts for the registered operations: two per multiply-add of their matrix products.

Elementwise work counts nothing, and neither does what a backward computes again (attention's logits, the MLP's
activation): a forward and its backward count what plain PyTorch's formulas would.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from math import prod

import torch

_COUNTER = "torch.utils.flop_counter"


def _attention(qkv, *_, **__):
    b, n, width = qkv
    return 2 * 2 * b * n * n * (width // 3)  # q k^T and p v


def _attention_backward(dout, qkv, *_, **__):
    return 2 * _attention(qkv)


def _qkv_attention(h, weight, bias, *_, **__):
    return 2 * prod(h[:-1]) * prod(weight) + _attention((*h[:-1], weight[0]))


def _qkv_attention_backward(dout, h, weight, qkv, out, lse, needs, *_, **__):
    return 2 * prod(h[:-1]) * prod(weight) * (needs[0] + needs[1]) + 2 * _attention(qkv)


def _mlp(h, w1, b1, w2, *_, **__):
    return 2 * prod(h[:-1]) * (prod(w1) + prod(w2))


def _mlp_backward(dy, h, w1, w2, pre, act, needs, *_, **__):
    products = prod(w2) * (1 + needs[3]) + prod(w1) * (needs[0] + needs[1])
    return 2 * prod(h[:-1]) * products


def _patch_embed(x, weight, bias, pos, *_, **__):
    return 2 * x[0] * pos[0] * prod(weight)


def _patch_embed_backward(dout, x, weight, patch_size, needs, *_, **__):
    return 2 * prod(dout[:-1]) * prod(weight) * (needs[0] + needs[1])


def _nothing(*_, **__):
    return 0


_ELEMENTWISE = ("layer_norm_modulate", "gated_residual", "gated_residual_layer_norm_modulate")
FORMULAS = {  # operation -> its formula, of the shapes of its tensors and its other arguments
    "attention": _attention,
    "attention_backward": _attention_backward,
    "qkv_attention": _qkv_attention,
    "qkv_attention_backward": _qkv_attention_backward,
    "mlp": _mlp,
    "mlp_inference": _mlp,
    "mlp_backward": _mlp_backward,
    "patch_embed": _patch_embed,
    "patch_embed_backward": _patch_embed_backward,
    **dict.fromkeys([name + end for name in _ELEMENTWISE for end in ("", "_backward")], _nothing),
    **dict.fromkeys(("patchify", "unpatchify"), _nothing),
}


def _register(counter):
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(torch.ops.ditfast, name))(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas once the counter is imported: importing it for them would import triton."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_register(module):
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def install() -> None:
    """Make the operations known to FlopCounterMode, now or when it is imported."""
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())
