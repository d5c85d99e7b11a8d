"""Variants: one stack of blocks, with the same weights, executed in different ways."""

import copy
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch
import torch._inductor.config as inductor

from ditfast import DiTBlock
from ditfast.models import carry
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.choice import names_in_force
from harness.block.workload import Workload
from harness.errors import error_line
from harness.verdicts import is_ours

NO_MIX_ORDER = {"triton.mix_order_reduction": False}  # dx separate from the sums over tokens, as before torch 2.10
TUNED = "compile-max-autotune"
COMPILED = {  # arguments of torch.compile
    "compile": {},
    "compile-no-mix-order": {"options": NO_MIX_ORDER},
    TUNED: {"mode": "max-autotune-no-cudagraphs"},
    "ditfast+compile": {},
}
PACKED = "ditfast+packed"  # inference with packed weights, forward only
VARIANTS = ("eager", "compile", "compile-no-mix-order", TUNED, "ditfast", PACKED, "ditfast+compile")


class Stack(torch.nn.Module):
    """Blocks that map (B, N, D) and (B, D) to (B, N, D), one after the other."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, x, c):
        for block in self.blocks:
            x = block(x, c)
        return x


class CarriedStack(Stack):
    """`ditfast` blocks as `ditfast.DiT` runs them: the last branch of a block is added by the next one."""

    def forward(self, x, c):
        carried = carry.start_carry(x, c, names_in_force())
        for block in self.blocks:
            carried = block(carried, c)
        return carry.add_pending(carried).x


def with_weights_of(blocks, make_block):
    """New blocks that share the parameters."""
    made = torch.nn.ModuleList([make_block() for _ in blocks])
    made.load_state_dict(blocks.state_dict(keep_vars=True), assign=True)
    return made


def build(variant: str, workload: Workload, blocks, official_block=None):
    """Build ``variant``'s stack on the parameters of ``blocks``, or on copies of them if they are packed."""
    if variant == PACKED:
        blocks = copy.deepcopy(blocks)  # `ditfast` shares the weights and would use the packed ones too
    if variant == "official":
        return Stack(with_weights_of(blocks, lambda: official_block(workload.dim, workload.heads)))
    if is_ours(variant):
        with torch.device("meta"):
            ours = with_weights_of(blocks, lambda: DiTBlock(workload.dim, workload.heads))
        stack = CarriedStack(ours)
    else:
        stack = Stack(blocks)
    if variant in COMPILED:
        return torch.compile(stack, fullgraph=True, dynamic=False, **COMPILED[variant])
    return stack


def why_not(variant: str) -> str | None:
    """Why this machine cannot run ``variant``; None if it can."""
    compiler, *_ = (os.environ.get("CXX") or "g++").split()
    if variant in COMPILED and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler, and {compiler} was not found"
    if variant == PACKED and (torch.cuda.is_available() or not on_cpu.takes_onednn(torch.bfloat16)):
        return "weights are not packed on this machine"
    if variant == "compile-no-mix-order" and not hasattr(inductor.triton, "mix_order_reduction"):
        return "this torch has no mix-order reduction"
    return None


def load_official(directory: str):
    """Import the ``DiTBlock`` of a checkout of the original.

    Raises:
        ValueError: models.py is missing, cannot be imported, or has no DiTBlock.
    """
    path = Path(directory) / "models.py"
    if not path.is_file():
        raise ValueError(f"must be a checkout of the original with a models.py, got {directory!r}")
    spec = importlib.util.spec_from_file_location("official_models", path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{path} needs the package {error.name!r}, which is not installed") from error
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {error_line(error)}") from error
    finally:
        sys.path.remove(str(path.parent))
    if not hasattr(module, "DiTBlock"):
        raise ValueError(f"{path} has no DiTBlock")
    return module.DiTBlock
