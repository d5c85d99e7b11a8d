"""The fused operations of a DiT. Each has one public function; its file holds the contract.

Every function takes ``backend=``: None (see `ditfast.ops.backend`), a name, or a tuple of names of which the first
that the operation has is used.
"""

from ditfast.ops import flops
from ditfast.ops.attention import attention
from ditfast.ops.backend import use_backend
from ditfast.ops.gated_residual import gated_residual
from ditfast.ops.junction import gated_residual_layer_norm_modulate
from ditfast.ops.layer_norm_modulate import layer_norm_modulate
from ditfast.ops.mlp import mlp
from ditfast.ops.patches import patch_embed, patchify, unpatchify
from ditfast.ops.qkv_attention import qkv_attention

flops.install()

__all__ = [
    "attention",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "layer_norm_modulate",
    "mlp",
    "patch_embed",
    "patchify",
    "qkv_attention",
    "unpatchify",
    "use_backend",
]
