"""Whether the automatic choice takes the C++ kernels on the CPU: where a committed table says they are faster.

Nothing is measured at run time, so runs repeat bit for bit. For each instruction set the table holds the number of
elements from which the kernel beat PyTorch, both forward and forward plus backward, as measured by
``benchmarks/bench_host.py``. PyTorch runs everything else, and in a compiled or exported graph also what is not large
enough at all sizes that the graph serves.
"""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from ditfast.ops.backends.availability import why_not_loaded
from ditfast.ops.backends.selfcheck import is_right
from ditfast.ops.op import PRECISIONS, Op

_Operations = dict[str, dict[str | None, int]]  # operation -> precision -> elements
_Table = dict[str | None, _Operations]  # by instruction set
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_ROWS: _Operations = {
    "layer_norm_modulate": {"bf16": 98304, "autocast": 98304, "fp16": 98304, "fp32": 393216},
    "gated_residual": {"bf16": 98304, "autocast": 98304, "fp16": 393216, "fp32": 393216},
    "gated_residual_layer_norm_modulate": {"bf16": 98304, "autocast": 98304, "fp16": 98304, "fp32": 98304},
}
_ATTENTION: _Operations = {"attention": {"bf16": 1024, "fp16": 1024, "fp32": 8192}}
_REST: _Operations = {
    "mlp": {"bf16": 393216, "fp32": 393216},
    "patchify": {"bf16": 4096, "fp16": 4096, "fp32": 4096},
    "unpatchify": {"bf16": 32768, "fp16": 32768, "fp32": 32768},
    "patch_embed": {"bf16": 98304, "autocast": 98304},
}
FASTER_FROM: _Table = {
    "x86_64_v3": _ROWS | _ATTENTION,
    "x86_64_v4": _ROWS | _ATTENTION,
    "x86_64_v4_bf16": _ROWS | _ATTENTION | _REST,
}
# more, under forward-mode AD: PyTorch computes the tangent of GELU in an extra pass
WITH_TANGENTS: _Table = {
    "x86_64_v4_bf16": {"mlp": {"fp32": 65536}},
}
# precision -> instruction sets; float32 is faster too, but breaks the numerical contract
ONEDNN: dict[str | None, tuple[str | None, ...]] = {"bf16": ("x86_64_v4_bf16",)}
_SHARED = {"qkv_attention": "attention"}  # operation -> the one whose entries it uses
# instruction sets whose norm of many tensors is faster at any size; that of x86_64_v2 is slower
NORM = ("x86_64_v3", "x86_64_v4", "x86_64_v4_bf16")
# instruction sets whose float32 matrix product beats PyTorch's, and the smallest size from which it does
PRODUCTS: tuple[str | None, ...] = ("x86_64_v4_bf16",)
PRODUCT_FROM = 128
NODE_FROM = 512  # the smallest side of a weight whose Linear gains more than 80 us of Python, an autograd node's
_PRECISION = getattr(torch.backends.mkldnn, "matmul", None)  # where it exists, the older setting may not be read
# No CPU with AMX has been measured: PyTorch uses AMX for bfloat16 products and these kernels do not, and its float32
# products were made for such CPUs. So PyTorch keeps these operations there.
_OF_PRODUCTS = ("attention", "mlp", "patch_embed")
_records: dict[str, Op] = {}  # by name, which torch.compile can treat as a constant


def install(ops: tuple[Op, ...]) -> None:
    """Register the operations' records."""
    _records.update((op.name, op) for op in ops)


def takes_host(
    op: Op, stream: torch.dtype, branch: torch.dtype, width: int, elements: int, is_able: Callable[[], bool]
) -> bool:
    """Whether the automatic choice runs ``op`` on the host kernels: faster by the table, correct by the self-check.

    Never while tracing, since consumers of a trace (the older ONNX exporter) expect PyTorch's own operations.

    Args:
        stream, branch: dtypes of the residual stream and of branches.
        width: the self-check's width.
        elements: size of the operation's largest tensor; for attention, of one head of q.
        is_able: tells whether the kernels can run on these arguments.
    """
    smallest = _faster_from(op.name, stream, branch)
    if smallest is None or _is_traced() or not _reaches(elements, smallest):
        return False
    return is_able() and _is_right(op.name, stream, branch, width)


def precisions(op: Op) -> list[str]:
    """The precisions in which `takes_host` takes ``op`` on large tensors."""
    name = _SHARED.get(op.name, op.name)
    return [key for key, pair in PRECISIONS.items() if _faster_from(name, *pair) is not None]


def is_below(dtype: torch.dtype, elements: dict[str, int]) -> bool:
    """Whether all of these operations, {name: elements}, are too small for `takes_host`, in one dtype."""
    table, precision = FASTER_FROM.get(isa(), {}), SHORT.get(dtype)
    for name, size in elements.items():
        smallest = table.get(name, {}).get(precision)
        if smallest is not None and _reaches(size, smallest):
            return False
    return True


def takes_onednn(dtype: torch.dtype) -> bool:
    """Whether calling oneDNN directly beats `F.linear`, for a Linear of any size."""
    faster = ONEDNN.get(SHORT.get(dtype))
    return faster is not None and isa() in faster and not _has_amx()


def takes_product(dtype: torch.dtype, *sizes: int) -> bool:
    """Whether our kernel beats PyTorch in a matrix product of these three sizes."""
    if dtype != torch.float32 or min(sizes) < PRODUCT_FROM or not _has_fast_products():
        return False
    return not _may_be_coarse()


def _may_be_coarse():
    """Whether PyTorch may compute float32 products in fewer bits, which may be faster."""
    if _PRECISION is None:
        return torch.get_float32_matmul_precision() != "highest"
    return _PRECISION.fp32_precision not in ("none", "ieee")


def _has_fast_products():
    return isa() in PRODUCTS and not _has_amx()


def product_is_right(dtype: torch.dtype, width: int) -> bool:
    """Whether the matrix product is right, by the self-check of `mlp` for tokens of this width."""
    return _is_right("mlp", dtype, dtype, 4 * width)


def takes_norm() -> bool:
    """Whether `ditfast.ops.host.norm` beats PyTorch on the CPU, at any size."""
    return isa() in NORM


def _reaches(elements, smallest):
    """Whether a tensor has so many elements; for sizes that vary in a compiled graph, whether it always has.

    A comparison would tie the graph to sizes on one side of ``smallest``.
    """
    if not torch.compiler.is_compiling() and not isinstance(elements, torch.SymInt):
        return bool(elements >= smallest)  # in a trace, elements is a tensor
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports SymPy

    return statically_known_true(elements >= smallest)


def _is_traced():
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def _faster_from(name, stream, branch):
    """Elements from which the kernel is faster; None for never."""
    precision = SHORT.get(branch) if stream == branch else "autocast" if stream == torch.float32 else None
    if name in _OF_PRODUCTS and precision in ("bf16", "autocast") and _has_amx():
        return None
    found = FASTER_FROM.get(isa(), {}).get(name, {}).get(precision)
    if name == "mlp" and precision == "fp32" and not _has_fast_products():
        found = None
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


# as torch.compiler.assume_constant_result, without importing the compiler: the extension cannot be traced
for _function in (isa, _has_amx, _is_right):
    _function._dynamo_marked_constant = True  # type: ignore[union-attr]
