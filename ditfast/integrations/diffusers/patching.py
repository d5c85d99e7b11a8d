"""Patch a diffusers model, and undo it."""

from typing import Any

from torch import nn

from ditfast.integrations.diffusers import basic, flux, norms, sd3
from ditfast.integrations.diffusers.patched import Patched
from ditfast.integrations.diffusers.report import Report
from ditfast.ops.backends.choice import names_in_force

_OURS: tuple[type[Patched], ...] = (
    basic.BasicTransformerBlock,
    sd3.JointTransformerBlock,
    sd3.SD3SingleTransformerBlock,
    flux.FluxTransformerBlock,
    flux.FluxSingleTransformerBlock,
    norms.AdaLayerNormZero,
    norms.AdaLayerNormZeroSingle,
    norms.AdaLayerNormContinuous,
)
_STANDS_FOR: dict[type, type[Patched]] = {cls.theirs: cls for cls in _OURS}
_KNOWN: Any = tuple(_STANDS_FOR)


def patch(model_or_pipe: Any, *, backend: str | None = None) -> Report:
    """Run the blocks and adaLN norms of a diffusers model on this package's operations, in place.

    The model computes the same result within the numerical contract. Only exactly known classes and code are patched;
    every other module is left alone and listed. A part that is wrapped, hooked or replaced, before or after patching,
    is called as a module and stays in effect. Patching again changes the backend.

    Args:
        model_or_pipe: a model, or a pipeline, whose components are all considered.
        backend: of the operations, as in `ditfast.models.DiT`.

    Raises:
        TypeError: neither a model nor a pipeline.
        ValueError: an unknown backend.
    """
    names_in_force(backend)
    patched: dict[str, str] = {}
    skipped: dict[str, str] = {}
    for name, model in _models(model_or_pipe).items():
        if _has_known(model):
            _patch_tree(name, model, backend, patched, skipped)
    return Report(patched, skipped)


def unpatch(model_or_pipe: Any) -> None:
    """Undo `patch`: give every module its diffusers class back.

    Raises:
        TypeError: neither a model nor a pipeline.
        ValueError: a patched module has been wrapped since, so its class or forward cannot be restored.
    """
    found = [item for model in _models(model_or_pipe).values() for item in model.named_modules()]
    found = [(name, module) for name, module in found if isinstance(module, Patched)]
    for name, module in found:
        if type(module) not in _OURS or "forward" in module.__dict__:
            raise ValueError(f"{name} was wrapped after patching (FSDP, offloading hooks): undo that first")
    for _, module in found:
        module.__class__ = module.theirs
        module.__dict__.pop("ditfast_backend", None)


def _models(model_or_pipe) -> dict[str, nn.Module]:
    """Models by name in the pipeline; a single model has the name ""."""
    if isinstance(model_or_pipe, nn.Module):
        return {"": model_or_pipe}
    components = getattr(model_or_pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(f"model_or_pipe must be a diffusers model or pipeline, got {type(model_or_pipe).__name__}")
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _has_known(module) -> bool:
    return any(isinstance(inner, _KNOWN) for inner in module.modules())


def _patch_tree(name, module, backend, patched, skipped):
    """Patch ``module`` or its submodules, and record the result by name."""
    reason = _patch_one(module, backend)
    if reason is None:
        patched[name] = type(module).__name__
        skipped |= {f"{name}.{part}".lstrip("."): why for part, why in module.left_parts().items()}
        return
    inside = [(part, child) for part, child in module.named_children() if _has_known(child)]
    if not inside or isinstance(module, _KNOWN):
        skipped[name] = reason
    if inside:
        for part, child in module.named_children():
            _patch_tree(f"{name}.{part}".lstrip("."), child, backend, patched, skipped)


def _patch_one(module: Any, backend) -> str | None:
    """Patch one module; returns why not if it cannot be patched."""
    if not isinstance(module, _KNOWN):
        return f"a {type(module).__name__} is not a known block or norm"
    ours = _STANDS_FOR.get(type(module), type(module))
    if ours not in _OURS:
        return f"a {type(module).__name__} is derived from a known class and may do anything"
    if "forward" in module.__dict__ and type(module) is not ours:
        return "its forward was replaced on the instance, as by offloading hooks"
    before, module.__class__ = type(module), ours
    reason = module.why_not()
    if reason is not None:
        module.__class__ = before
        return reason
    module.ditfast_backend = backend
    return None
