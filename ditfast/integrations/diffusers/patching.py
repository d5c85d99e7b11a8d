"""Patching a model of diffusers, and undoing it."""

from torch import nn

from ditfast.integrations.diffusers import basic, flux, norms, sd3
from ditfast.integrations.diffusers.patched import Patched
from ditfast.integrations.diffusers.report import Report
from ditfast.ops.backends.choice import names_in_force

_OURS = (
    basic.BasicTransformerBlock,
    sd3.JointTransformerBlock,
    sd3.SD3SingleTransformerBlock,
    flux.FluxTransformerBlock,
    flux.FluxSingleTransformerBlock,
    norms.AdaLayerNormZero,
    norms.AdaLayerNormZeroSingle,
    norms.AdaLayerNormContinuous,
)
_STANDS_FOR = {cls.theirs: cls for cls in _OURS}


def patch(model_or_pipe, *, backend: str | None = None) -> Report:
    """Let the blocks and adaLN norms of a model of diffusers run on this package's operations, in place.

    The model computes the same within the numerical contract. Only classes and code that are known exactly are
    patched; every other module is left alone and listed. A part that is wrapped, hooked or replaced, before or after,
    is called as a module and keeps taking effect. Patching again changes the backend.

    Args:
        model_or_pipe: a model, or a pipeline, of which each component is looked at.
        backend: of the operations, as in `ditfast.models.DiT`.

    Raises:
        TypeError: neither a model nor a pipeline.
        ValueError: no backend has that name.
    """
    names_in_force(backend)
    patched, skipped = {}, {}
    for name, model in _models(model_or_pipe).items():
        if _has_known(model):
            _patch_tree(name, model, backend, patched, skipped)
    return Report(patched, skipped)


def unpatch(model_or_pipe) -> None:
    """Undo `patch`: every module has its class of diffusers again.

    Raises:
        TypeError: neither a model nor a pipeline.
        ValueError: a patched module was wrapped since, so that its class or forward is not `patch`'s to change.
    """
    found = [item for model in _models(model_or_pipe).values() for item in model.named_modules()]
    found = [(name, module) for name, module in found if isinstance(module, Patched)]
    for name, module in found:
        if type(module) not in _OURS or "forward" in module.__dict__:
            raise ValueError(f"{name} was wrapped after it was patched (FSDP, offloading hooks): undo that first")
    for _, module in found:
        module.__class__ = module.theirs
        module.__dict__.pop("ditfast_backend", None)


def _models(model_or_pipe) -> dict[str, nn.Module]:
    """Models by their name in a pipeline."""
    if isinstance(model_or_pipe, nn.Module):
        return {"": model_or_pipe}
    components = getattr(model_or_pipe, "components", None)
    if not isinstance(components, dict):
        raise TypeError(
            f"model_or_pipe must be a model or a pipeline of diffusers, got {type(model_or_pipe).__name__}"
        )
    return {name: part for name, part in components.items() if isinstance(part, nn.Module)}


def _has_known(module) -> bool:
    return any(isinstance(inner, tuple(_STANDS_FOR)) for inner in module.modules())


def _patch_tree(name, module, backend, patched, skipped):
    """Patch ``module``, or what is in it, and note under their names what was done."""
    reason = _patch_one(module, backend)
    if reason is None:
        patched[name] = type(module).__name__
        skipped |= {f"{name}.{part}".lstrip("."): why for part, why in module.left_parts().items()}
        return
    inside = [(part, child) for part, child in module.named_children() if _has_known(child)]
    if not inside or isinstance(module, tuple(_STANDS_FOR)):
        skipped[name] = reason
    if inside:
        for part, child in module.named_children():
            _patch_tree(f"{name}.{part}".lstrip("."), child, backend, patched, skipped)


def _patch_one(module, backend) -> str | None:
    """Patch one module; why not, if it cannot be."""
    if not isinstance(module, tuple(_STANDS_FOR)):
        return f"a {type(module).__name__} is no block or norm that is known"
    ours = _STANDS_FOR.get(type(module), type(module))
    if ours not in _OURS:
        return f"a {type(module).__name__} is derived from a class that is known, and may do anything"
    if "forward" in module.__dict__ and type(module) is not ours:
        return "its forward was replaced on the instance, as by offloading hooks"
    before, module.__class__ = type(module), ours
    reason = module.why_not()
    if reason is not None:
        module.__class__ = before
        return reason
    module.ditfast_backend = backend
    return None
