"""Differences between weights and a model, and between a model and the one that its config builds."""

import inspect
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ditfast.checkpoints.files import unwrap, unwrapped_name
from ditfast.counted import counted
from ditfast.models.dit import DiT
from ditfast.models.meta import on_meta
from ditfast.ops.checks import FLOATING

# attributes that are part of the function but not of the weights
SETTINGS = ("approximate", "eps", "freq_shift", "num_classes", "num_heads", "scale")
_REMEDY = "merge adapters such as LoRA first, or build the DiT with arguments that give its parts"


def first_difference(
    given: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], here: str, there: str
) -> str | None:
    """The first difference in names, shapes or kinds of dtype, and how many more there are; None if there is none.

    Args:
        given, expected: state dicts; the dtype of ``given`` may be any floating-point one.
        here, there: what they belong to.
    """
    names = (*expected, *sorted(given.keys() - expected.keys()))
    differing = [name for name in names if _differs(expected.get(name), given.get(name))]
    if not differing:
        return None
    name, more = differing[0], len(differing) - 1
    text = f"{name} is {_describe(given.get(name))} in {here}, {_describe(expected.get(name))} in {there}"
    return text + (f"; {counted(more, 'more differs', 'more differ')}" if more else "")


def check_savable(model: DiT, config: dict) -> dict[str, torch.Tensor]:
    """The weights of a model that ``config`` builds, under its own names, without wrappers.

    A subclass with arguments of its own is not checked: its config does not have them.

    Raises:
        ValueError: it would be loaded as another model, or not at all; the first difference is named.
    """
    weights = unwrap(model.state_dict())
    if not _is_built_by(type(model), config):
        return weights
    with on_meta():
        built = type(model)(**config)
    found = first_difference(weights, built.state_dict(), "the model", "what it builds")
    if found := found or next(_other_settings(model, built), None):
        raise ValueError(f"model.config must build the model for it to be saved, but {found}: {_REMEDY}")
    return weights


def _is_built_by(cls, config):
    parameters = inspect.signature(cls).parameters
    own = (each for each in parameters.values() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD))
    if {each.name for each in own} - inspect.signature(DiT).parameters.keys():
        return False
    try:
        inspect.signature(cls).bind(**config)
    except TypeError:
        return False
    return True


def _other_settings(model: nn.Module, built: nn.Module) -> Iterator[str]:
    """What changes the function but not the weights: other settings, other modules without weights."""
    modules = {unwrapped_name(name): module for name, module in model.named_modules()}  # a wrapper's content is last
    for name, expected in built.named_modules():
        if (found := modules.get(name)) is None:  # inside a replaced part that has its own way to compute
            continue
        if not expected.state_dict() and not isinstance(found, type(expected) | nn.Dropout):
            yield f"{name} is a {type(found).__name__} in the model, a {type(expected).__name__} in what it builds"
        for key in SETTINGS:
            ours, theirs = getattr(found, key, None), getattr(expected, key, None)
            if None not in (ours, theirs) and ours != theirs:
                yield f"{name}{'.' * bool(name)}{key} is {ours!r} in the model, {theirs!r} in what it builds"


def _differs(expected, given):
    return expected is None or given is None or expected.shape != given.shape or given.dtype not in FLOATING


def _describe(tensor):
    return "missing" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
