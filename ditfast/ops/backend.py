"""Which backend an operation runs on.

A name is taken, in this order, from the call's ``backend=``, the model's, the innermost ``use_backend``, the
environment variable ``DITFAST_BACKEND``; otherwise the choice is automatic. A name that an operation does not
have is an error in its own ``backend=`` and is passed over elsewhere (``use_backend("triton")`` means "wherever
there is a Triton kernel"). A name that the operation has but that cannot run here always raises.
"""

import importlib.util
import os
from contextlib import contextmanager

import torch

# operation -> its backends; `reference` is plain PyTorch
OPS = {
    "layer_norm_modulate": ("triton", "reference"),
    "gated_residual": ("triton", "reference"),
    "gated_residual_layer_norm_modulate": ("triton", "reference"),
    "mlp": ("triton", "reference"),
    "attention": ("cuda", "triton", "sdpa", "host", "reference"),
    "qkv_attention": ("cuda", "triton", "sdpa", "host", "reference"),
    "patchify": ("triton", "reference"),
    "unpatchify": ("triton", "reference"),
    "patch_embed": ("triton", "reference"),
}
NAMES = ("auto", *sorted({name for names in OPS.values() for name in names}))

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # what the kernels read and write


def _checked(name, where):
    if name not in NAMES:
        raise ValueError(f"{where} must be one of {', '.join(NAMES)}, got {name!r}")
    return name


_AUTOMATIC = ("cuda",)  # devices on which the automatic choice considers kernels

_environment = _checked(os.environ.get("DITFAST_BACKEND", "auto"), "DITFAST_BACKEND")
# A plain global, not a ContextVar: torch.compile guards on it and recompiles when it changes.
_contexts: tuple[str, ...] = ()
_log: dict[str, list[str]] | None = None


@contextmanager
def use_backend(name: str):
    """Run the operations that have the backend ``name`` on it, inside the ``with`` block.

    Nests: each operation takes the innermost name that it has. ``"auto"`` undoes the outer names.

    Raises:
        ValueError: ``name`` is no backend of any operation.
    """
    global _contexts
    outer = _contexts
    _contexts = (_checked(name, "backend"), *outer)
    try:
        yield
    finally:
        _contexts = outer


@contextmanager
def record():
    """Collect what ran: yields a dict, operation -> list of the backends it ran on, forward and backward."""
    global _log
    outer, _log = _log, {}
    try:
        yield _log
    finally:
        _log = outer


def note(op: str, name: str) -> None:
    """Tell `record` that ``op`` ran on ``name``."""
    # in this order: a compiled function must not depend on _log
    if not torch.compiler.is_compiling() and _log is not None:
        _log.setdefault(op, []).append(name)


def active(model_backend: str | None = None) -> tuple[str, ...]:
    """The names in force, first wins: the model's, those of ``use_backend``, the environment's."""
    model = () if model_backend is None else (_checked(model_backend, "backend"),)
    return (*model, *_contexts, _environment)


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


_installed = {name: importlib.util.find_spec(name) is not None for name in ("triton", "ditfast._C")}
_interpreting = interpreting()


def why_not(op: str, name: str, device_type: str) -> str | None:
    """Why ``op`` cannot run on backend ``name`` on this kind of device; None if it can."""
    if name not in OPS[op]:
        return f"{op} has no such backend (it has {', '.join(OPS[op])})"
    if name == "triton":
        if not _installed["triton"]:
            return "triton is not installed"
        if device_type != "cuda" and not _interpreting:
            return f"triton needs a CUDA tensor, or TRITON_INTERPRET=1, and this one is on {device_type}"
    if name == "cuda":
        return _why_not_cuda(device_type)
    if name == "host":
        if not _installed["ditfast._C"]:
            return "the extension ditfast._C is not built"
        if device_type != "cpu":
            return f"host needs a CPU tensor, and this one is on {device_type}"
    return None


def _why_not_cuda(device_type):
    if not _installed["ditfast._C"]:
        return "the extension ditfast._C is not built"
    if device_type != "cuda":
        return f"cuda needs a CUDA tensor, and this one is on {device_type}"
    return _why_not_on_this_gpu()


def _why_not_on_this_gpu():
    from ditfast import _C

    index = torch.cuda.current_device()
    if index not in _on_gpu:
        _on_gpu[index] = _C.cuda_attention_supported(index) or None
    return _on_gpu[index]


_on_gpu: dict[int, str | None] = {}
# what torch.compiler.assume_constant_result does, without importing the compiler: the extension cannot be traced
_why_not_on_this_gpu._dynamo_marked_constant = True


def choose(op: str, requested, device_type: str, unsupported: str | dict[str, str | None] | None = None) -> str:
    """The backend of one call: a name, or "auto" where only the running operation can tell.

    Args:
        requested: the call's ``backend=``: None, a name (strict), or a tuple of names in order of preference.
        unsupported: why these arguments rule out the operation's kernels (None: they do not); by backend, if they
            differ.

    Raises:
        ValueError: the call names a backend that the operation does not have.
        RuntimeError: the backend asked for by name cannot run here, or not on these arguments.
    """
    if isinstance(requested, str):
        if requested != "auto" and requested not in OPS[op]:
            raise ValueError(f"backend of {op} must be one of auto, {', '.join(OPS[op])}, got {requested!r}")
        names = (requested,)
    else:
        names = active() if requested is None else requested
    for name in names:
        if name == "auto":
            break
        if name in OPS[op]:
            reason = why_not(op, name, device_type)
            if reason is None and name not in ("reference", "sdpa"):
                reason = unsupported[name] if isinstance(unsupported, dict) else unsupported
            if reason is not None:
                raise RuntimeError(f"{op}: backend {name!r} cannot run: {reason}")
            return name
    if op in ("attention", "qkv_attention"):
        return "auto" if device_type in _AUTOMATIC else "sdpa"
    kernel = device_type in _AUTOMATIC and unsupported is None and why_not(op, "triton", device_type) is None
    return "auto" if kernel else "reference"


def resolve(op: str, name: str, stream: torch.Tensor, branch: torch.Tensor, width: int) -> str:
    """What "auto" means for this operation, decided while it runs on real tensors.

    Args:
        stream, branch: tensors of the residual stream and of a branch, for their dtypes and device.
        width: the size of what the kernels hold at once: D, the MLP's width, or a patch's.
    """
    if name == "auto":
        from ditfast.ops.selfcheck import trusted

        name = "triton" if trusted(op, stream.dtype, branch.dtype, width, stream.device) else "reference"
    note(op, name)
    return name
