"""Whether the automatic choice takes the C++ kernels on the CPU: where a committed table says that they are faster.

The table is never made at run time, so that a run repeats bit for bit. It holds, for each instruction set, the number
of elements from which the kernel beat PyTorch, forward as well as forward and backward, in measurements by
``benchmarks/bench_host.py``. What is not in it stays PyTorch's.
"""

import torch
from torch.autograd import forward_ad

from ditfast.ops.backends.availability import why_not_loaded
from ditfast.ops.backends.selfcheck import is_right
from ditfast.ops.op import Op

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_ROWS = {
    "layer_norm_modulate": {"bf16": 98304, "autocast": 98304, "fp16": 98304, "fp32": 393216},
    "gated_residual": {"bf16": 98304, "autocast": 98304, "fp16": 393216, "fp32": 393216},
    "gated_residual_layer_norm_modulate": {"bf16": 98304, "autocast": 98304, "fp16": 98304, "fp32": 98304},
}
_ATTENTION = {"attention": {"bf16": 1024, "fp16": 1024, "fp32": 8192}}
_REST = {
    "mlp": {"bf16": 393216},  # in fp32 its GEMMs are all that counts: blocks of DiT-XL/2 gained nothing
    "patchify": {"bf16": 4096, "fp16": 4096, "fp32": 4096},
    "unpatchify": {"bf16": 32768, "fp16": 32768, "fp32": 32768},
    "patch_embed": {"bf16": 98304, "autocast": 98304},
}
FASTER_FROM = {  # instruction set -> operation -> precision -> elements
    "x86_64_v3": _ROWS | _ATTENTION,
    "x86_64_v4": _ROWS | _ATTENTION,
    "x86_64_v4_bf16": _ROWS | _ATTENTION | _REST,
}
WITH_TANGENTS = {  # what forward-mode AD adds: PyTorch makes the tangent of GELU in a pass of its own
    "x86_64_v4_bf16": {"mlp": {"fp32": 65536}},
}
ONEDNN = {"x86_64_v4_bf16": ("bf16",)}  # in float32 it is faster, too, but breaks the numerical contract
# In bfloat16 PyTorch multiplies on AMX, where the CPU has it, which these kernels do not and which no measurement has
# seen yet: what is made of products stays PyTorch's there.
_OF_PRODUCTS = ("attention", "mlp", "patch_embed")
_records: dict[str, Op] = {}  # by name, which torch.compile can take for a constant


def install(ops: tuple[Op, ...]) -> None:
    """Make the records of the operations known."""
    _records.update((op.name, op) for op in ops)


def takes_host(op: Op, stream: torch.dtype, branch: torch.dtype, width: int, elements: int, is_able) -> bool:
    """Whether ``op`` runs on the host kernels by itself: faster by the table, and right by the self-check.

    Not while a trace is made, which others read as PyTorch's own operations (the older ONNX exporter).

    Args:
        stream, branch: dtypes of the residual stream and of branches.
        width: what the self-check asks for.
        elements: of the operation's largest tensor; of attention, those of one head of q.
        is_able: a function that says whether they can run on these arguments.
    """
    smallest = _faster_from(op.name, stream, branch)
    if smallest is None or elements < smallest or _is_traced():
        return False
    return is_able() and _is_right(op.name, stream, branch, width)


def is_below(dtype: torch.dtype, elements: dict[str, int]) -> bool:
    """Whether these operations, named with their elements, are all too small for `takes_host`, in one dtype."""
    table, precision = FASTER_FROM.get(isa(), {}), SHORT.get(dtype)
    for name, size in elements.items():
        smallest = table.get(name, {}).get(precision)
        if smallest is not None and size >= smallest:
            return False
    return True


def takes_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN itself computes a Linear faster than `F.linear`, of any size."""
    return SHORT.get(dtype) in ONEDNN.get(isa(), ()) and not _has_amx()


def _is_traced():
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def _faster_from(name, stream, branch):
    """Elements from which an operation is faster; None for never."""
    precision = SHORT.get(branch) if stream == branch else "autocast" if stream == torch.float32 else None
    if name in _OF_PRODUCTS and precision in ("bf16", "autocast") and _has_amx():
        return None
    found = FASTER_FROM.get(isa(), {}).get(name, {}).get(precision)
    if found is None and forward_ad._current_level >= 0:
        return WITH_TANGENTS.get(isa(), {}).get(name, {}).get(precision)
    return found


def isa() -> str | None:
    """The instruction set whose kernels are in use; None without the extension."""
    if why_not_loaded() is not None:
        return None
    from ditfast import _C

    return _C.isa()


def _has_amx():
    if why_not_loaded() is not None:
        return False
    from ditfast import _C

    return _C.has_amx()


def _is_right(name, stream, branch, width):
    return is_right(_records[name], "host", stream, branch, width, torch.device("cpu"))


# what torch.compiler.assume_constant_result does, without importing the compiler: the extension cannot be traced
for _function in (isa, _has_amx, _is_right):
    _function._dynamo_marked_constant = True
