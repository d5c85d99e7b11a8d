"""Which diffusers code is known, so that a replacement is known to compute the same.

The code is compared, not the version: a method is identified by the hash of its syntax tree, without docstring and
annotations.
"""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable

import diffusers
from torch import nn

from ditfast.models.plain import forget_forward, is_original, remember_forward

KNOWN = {  # seen in 0.33.1 to 0.42.1, those of FluxSingleTransformerBlock from 0.35.2 on
    "AdaLayerNormContinuous.forward": "8e89d6e24794",
    "AdaLayerNormZero.forward": "ca49e69b25a8",
    "AdaLayerNormZeroSingle.forward": "01888db5dcad",
    "Attention.forward": "56923c82a74d",
    "AttnProcessor2_0.__call__": "d6afd66db9fb",
    "BasicTransformerBlock.forward": "b88ddcc06488",
    "FeedForward.forward": "180c963b5e09",
    "FluxSingleTransformerBlock.forward": "0e23043492cc",
    "FluxTransformerBlock.forward": "82c116a62253",
    "GELU.forward": "21d977fb1e20",
    "GELU.gelu": "db4a98886ec8",
    "JointAttnProcessor2_0.__call__": "d68313c2ccfc",
    "JointTransformerBlock.forward": "e0fc6beb424e",
    "SD35AdaLayerNormZeroX.forward": "2076b5bd42d2",
    "SD3SingleTransformerBlock.forward": "e700fb5a2279",
}
_NO_CODE = ("annotation", "returns", "ctx", "kind", "type_comment", "type_params")


def why_unknown(cls: type) -> str | None:
    """Why a diffusers class does not have the known code; None if it does."""
    for name in KNOWN:
        owner, method = name.split(".")
        if owner == cls.__name__ and fingerprint(getattr(cls, method)) != KNOWN[name]:
            return f"{name} of diffusers {diffusers.__version__} is not the code that ditfast replaces"
    return None


def remember(cls: type[nn.Module]) -> type[nn.Module]:
    """Register a diffusers class with `ditfast.models.plain`, if its code is known."""
    if why_unknown(cls) is None and not hasattr(cls.forward, "__wrapped__"):
        return remember_forward(cls)
    forget_forward(cls)
    return cls


def why_changed(cls: type[nn.Module]) -> str | None:
    """Why a remembered class does not, or no longer, have the known forward; None if it does."""
    return None if is_original(cls) else why_unknown(cls) or f"{cls.__name__}.forward has been replaced"


def fingerprint(function: Callable) -> str:
    """A hash of a function's code that is stable across Python versions; "" if its source cannot be read."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, SyntaxError, TypeError):
        return ""
    return hashlib.sha256(outline(tree).encode()).hexdigest()[:12]


def outline(node: object) -> str:
    """A syntax tree in one line, without the fields that only some Python versions have."""
    if isinstance(node, list):
        return "[" + ",".join(map(outline, node)) + "]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        if name in _NO_CODE or value is None or value == []:
            continue
        if name == "body" and isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            value = value[1:]
        fields.append(f"{name}={outline(value)}")
    return f"{type(node).__name__}({','.join(fields)})"
