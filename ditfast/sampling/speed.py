"""The speed options of `python -m ditfast.sample`: dtype, compiler, CUDA graphs, memory."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import torch

from ditfast.models.dit import DiT
from ditfast.sampling.engine import Engine
from ditfast.sampling.modulation import TABLE_BYTES
from ditfast.sampling.stored import store

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MIB = 2**20
_CPU_CHECKS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public names for these


def add_options(add: Callable[..., Any]) -> None:
    """``add`` is a parser's ``add_argument``."""
    dtypes = "compute dtype of the model's branches; auto: bf16 if the hardware supports it (fp32; demo: auto)"
    add("--dtype", choices=("auto", *DTYPES), default="fp32", help=dtypes)
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--no-graphs", action="store_true", help="on a GPU, launch each kernel instead of replaying CUDA graphs")
    table = {"type": int, "default": TABLE_BYTES // _MIB, "metavar": "N"}
    add("--table-mib", **table, help=f"memory limit for precomputed modulation, 0 to disable ({table['default']})")


def check_options(parser: ArgumentParser, o: Namespace) -> None:
    if not 0 <= o.table_mib < _MIB:
        parser.error(f"--table-mib must be in [0, {_MIB - 1}], got {o.table_mib}")


def settle_dtype(name: str, device: str) -> str:
    """Resolve "auto" to a name in `DTYPES`: bf16 if ``device`` multiplies in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if multiplies_bf16(device) else "fp32"


def multiplies_bf16(device: str) -> bool:
    """Whether a GPU, or a CPU with AVX512_BF16 or AMX, multiplies bf16 matrices in hardware."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and any(getattr(torch.cpu, check, bool)() for check in _CPU_CHECKS)


def make_engine(o: Namespace, model: DiT) -> Engine:
    """The engine of a run. It has its own weights: the model need not be kept."""
    dtype, table_bytes = DTYPES[o.dtype], o.table_mib * _MIB
    return Engine(store(model, dtype), dtype, table_bytes=table_bytes, compile=o.compile, graphs=not o.no_graphs)
