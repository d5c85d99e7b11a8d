"""Start every command before importing anything that may be missing."""

import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from harness.interpreting import choose_interpreter

PACKAGES = ("torch", "ditfast", "rich")


def start(name: str, interpret: bool = False) -> int:
    """Run ``main`` of ``harness.<name>.command`` and return its exit status.

    Args:
        interpret: without a GPU, run kernels in Triton's interpreter, which must be chosen before Triton is imported.
    """
    for package in PACKAGES:
        if find_spec(package) is None:
            command = Path(sys.argv[0]).name
            sys.exit(f"{command} needs the package {package}, which is not installed: pip install -e '.[bench]'")
    from ditfast.heap import keep_freed_memory

    keep_freed_memory()  # for all variants alike; else it is luck which of them fault on what an earlier one freed
    if interpret and not _has_gpu():
        choose_interpreter()
    command = import_module(f"harness.{name}.command")
    try:
        return command.main()
    except Exception:
        traceback.print_exc()
        import_module("harness.errors").leave_if_gpu_is_lost()
        return 1


def _has_gpu():
    import torch

    return torch.cuda.is_available()
