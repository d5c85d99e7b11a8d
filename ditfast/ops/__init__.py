"""The fused operations of a DiT. Each has one public function; its file holds the contract and ends with its record.

Every function takes ``backend=``: None (see `ditfast.ops.backends.choice`), a name, or a tuple of names, of which
the first that the operation has is used. Under forward-mode AD the kernels compute outputs and tangents in one pass.
"""

from ditfast.ops import flop_counter
from ditfast.ops.attention import OP as ATTENTION
from ditfast.ops.attention import attention
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.choice import use_backend
from ditfast.ops.gated_residual import OP as GATED_RESIDUAL
from ditfast.ops.gated_residual import gated_residual
from ditfast.ops.junction import OP as JUNCTION
from ditfast.ops.junction import gated_residual_layer_norm_modulate
from ditfast.ops.layer_norm_modulate import OP as LAYER_NORM_MODULATE
from ditfast.ops.layer_norm_modulate import layer_norm_modulate
from ditfast.ops.mlp import OP as MLP
from ditfast.ops.mlp import mlp
from ditfast.ops.op import Op
from ditfast.ops.patch_embed import OP as PATCH_EMBED
from ditfast.ops.patch_embed import patch_embed
from ditfast.ops.patches import PATCHIFY, UNPATCHIFY, patchify, unpatchify
from ditfast.ops.qkv_attention import OP as QKV_ATTENTION
from ditfast.ops.qkv_attention import qkv_attention

ALL: tuple[Op, ...] = (
    LAYER_NORM_MODULATE,
    GATED_RESIDUAL,
    JUNCTION,
    MLP,
    ATTENTION,
    QKV_ATTENTION,
    PATCHIFY,
    UNPATCHIFY,
    PATCH_EMBED,
)
flop_counter.install(ALL)
on_cpu.install(ALL)

__all__ = [
    "ALL",
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
