"""Variants: one model, with the same weights, executed in different ways."""

import importlib.util
import os
from copy import deepcopy
from functools import cache

import torch
import torch._inductor.config as inductor

from ditfast.checkpoints.convert import match_original, to_diffusers
from ditfast.models.meta import on_meta
from harness.block.variants import why_not as why_no_compiler
from harness.model.eager import EagerDiT

COMPILED = {  # arguments of torch.compile
    "compile": {},
    "compile-frozen": {"options": {"freezing": True}},
}
PATCHED = "ditfast+diffusers"  # diffusers' model, patched
FP32 = "eager-fp32"  # as the original samples unless told otherwise
OTHERS = ("compile", "compile-frozen", "diffusers", "zentorch", "ditfast", "ditfast+compile", PATCHED)
VARIANTS = ("eager", FP32, *OTHERS)
_PACKAGES = {"diffusers": "diffusers", PATCHED: "diffusers", "zentorch": "zentorch"}
_INFERENCE = (FP32, "compile-frozen", "diffusers", "zentorch", PATCHED)  # diffusers keeps q, k and v apart


def why_not(variant: str, mode: str, dtype: str) -> str | None:
    """Why this machine cannot run ``variant``, or not in this mode or dtype; None if it can."""
    package = _PACKAGES.get(variant)
    if package and importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed"
    if variant in _INFERENCE and mode == "train":
        return "it is measured only in inference"
    if variant == FP32 and dtype == "fp32":
        return "identical to eager"
    return why_no_compiler("compile") if variant in (*COMPILED, "zentorch") or variant.endswith("+compile") else None


def build(variant: str, model):
    """Build ``variant`` on the parameters of ``model``, a `ditfast.DiT`; the result is called as ``f(x, t, y)``."""
    if variant == "ditfast":
        return model
    if variant == "ditfast+compile":
        return torch.compile(model, fullgraph=True, dynamic=False)
    if variant in ("diffusers", PATCHED):
        return _diffusers(model, patched=variant == PATCHED)
    if variant == FP32:
        return _Fp32(model)
    if variant == "zentorch":
        return _zentorch(model)
    made = make_eager(model)
    return torch.compile(made, fullgraph=True, dynamic=False, **COMPILED[variant]) if variant in COMPILED else made


def make_eager(model) -> EagerDiT:
    with torch.device("meta"):
        made = EagerDiT(model)
    made.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    return made


@cache  # zentorch finds reordered weights by address, even after the tensor was freed and its memory reused
def _zentorch(model):
    os.environ.setdefault("ZENDNNL_MATMUL_WEIGHT_CACHE", "1")  # reordered copies; by default weights change in place
    importlib.import_module("zentorch")
    compiled = torch.compile(make_eager(deepcopy(model)), fullgraph=True, dynamic=False, backend="zentorch")

    def call(*inputs):
        # zentorch sets a pass of Inductor for the process: later variants would run its kernels
        with inductor.patch(joint_custom_post_pass=None):
            return compiled(*inputs)

    return call


class _Fp32(torch.nn.Module):
    """Computes on float32 copies of the weights, even under autocast; input and output keep their dtype."""

    def __init__(self, model):
        super().__init__()
        self.model = make_eager(deepcopy(model).float())

    def forward(self, x, t, y):
        with torch.autocast(x.device.type, enabled=False):
            return self.model(x.float(), t, y).to(x.dtype)


class _Diffusers(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, y):
        return self.model(x, t, y).sample


def _diffusers(model, patched):
    from diffusers import DiTTransformer2DModel

    from ditfast.integrations.diffusers import patch

    config, state = to_diffusers(model.config, model.state_dict())
    with on_meta():
        theirs = DiTTransformer2DModel(**config)
    theirs.load_state_dict(state, assign=True, strict=False)
    device = model.pos_embed.device
    theirs.pos_embed.pos_embed = model.pos_embed.detach().clone()  # a buffer that is not in the state dict
    match_original(theirs)
    if patched:
        patch(theirs)
    return _Diffusers(theirs.to(device).eval())
