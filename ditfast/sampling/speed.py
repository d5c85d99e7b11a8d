"""The options of `python -m ditfast.sample` that trade for speed: dtype, compiler, graphs, memory."""

import torch

from ditfast.sampling.engine import Engine
from ditfast.sampling.modulation import TABLE_BYTES
from ditfast.sampling.stored import store

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MIB = 2**20
_OF_A_CPU = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # torch has no public name for them


def add_options(add) -> None:
    """``add`` is a parser's ``add_argument``."""
    dtypes = "of the model's branches; auto: bf16 where the machine multiplies it, else fp32 (fp32; demo: auto)"
    add("--dtype", choices=("auto", *DTYPES), default="fp32", help=dtypes)
    add("--compile", action="store_true", help="let torch.compile make the model's steps")
    add("--no-graphs", action="store_true", help="on a GPU, launch each kernel instead of replaying CUDA graphs")
    table = {"type": int, "default": TABLE_BYTES // _MIB, "metavar": "N"}
    add("--table-mib", **table, help=f"of memory for modulation computed ahead, 0 for none ({table['default']})")


def check_options(parser, o) -> None:
    if not 0 <= o.table_mib < _MIB:
        parser.error(f"--table-mib must be in [0, {_MIB - 1}], got {o.table_mib}")


def settle_dtype(name: str, device: str) -> str:
    """One of `DTYPES`; "auto" is bf16 where ``device`` multiplies in it, else fp32."""
    if name != "auto":
        return name
    return "bf16" if multiplies_bf16(device) else "fp32"


def multiplies_bf16(device: str) -> bool:
    """Whether a GPU, or a CPU by AVX512_BF16 or AMX, multiplies matrices of bf16."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return kind == "cpu" and any(getattr(torch.cpu, ask, bool)() for ask in _OF_A_CPU)


def make_engine(o, model) -> Engine:
    """The engine of a run, with weights of its own: the model's need not be kept."""
    dtype = DTYPES[o.dtype]
    options = {"table_bytes": o.table_mib * _MIB, "compile": o.compile, "graphs": not o.no_graphs}
    return Engine(store(model, dtype), dtype, **options)
