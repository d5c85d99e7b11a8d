"""Backends of a run; a resumed run uses the ones it started with where this machine has them."""

from typing import Any

import torch

from ditfast import ops
from ditfast.counted import counted
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.availability import why_not
from ditfast.ops.backends.choice import names_in_force, repeat_choices
from ditfast.training import TrainError


def check_backend(name: str | None, device: str) -> None:
    """Reject a backend that does not exist or cannot run here.

    Raises:
        TrainError: with the reason.
    """
    try:
        names_in_force(name)
    except ValueError as error:
        variable = "" if str(error).startswith("DITFAST") else "--"
        raise TrainError(f"{variable}{error}") from error
    for op in ops.ALL:
        reason = name is not None and name in op.backends and why_not(op, name, device.split(":")[0])
        if reason:
            raise TrainError(f"--backend {name} cannot run: {reason}")


def chosen_backends(ran: dict[str, list[str]]) -> dict[str, str]:
    """Operation -> backend of its forward, from what `ditfast.ops.backends.log.record` collected."""
    chosen = {op: names[0] for op, names in sorted(ran.items())}
    if "attention" in chosen:
        chosen.setdefault("qkv_attention", chosen["attention"])  # without a kernel it is a Linear plus attention
    return chosen


def repeat_backends(then: dict[str, str], device_type: str) -> list[str]:
    """Make the automatic choice use a checkpoint's backends. Returns one line for each that is missing here."""
    usable, missing = {}, []
    for op in ops.ALL:
        name = then.get(op.name)
        reason = None if name is None else why_not(op, name, device_type)
        if reason is not None:
            missing.append(f"{op.name} used {name} before, which cannot run here: {reason}")
        elif name is not None:
            usable[op.name] = name
    repeat_choices(usable)
    return missing


def describe_cpu(device: str) -> dict[str, Any] | None:
    """The rest of what determines a CPU run bit for bit: the kernels' instruction set and the number of threads."""
    return {"isa": on_cpu.isa(), "threads": torch.get_num_threads()} if device == "cpu" else None


def compare_cpu(then: dict[str, Any] | None, now: dict[str, Any] | None) -> list[str]:
    """One line per difference since a checkpoint was written; none if the checkpoint has no record."""
    if not then or not now:
        return []
    isas, threads = ((then[name], now[name]) for name in ("isa", "threads"))
    lines = []
    if isas[0] != isas[1]:
        lines.append(f"the CPU kernels used {isas[0]} before and use {isas[1]} now: sums may round differently")
    if threads[0] != threads[1]:
        lines.append(
            f"the run used {counted(threads[0], 'thread')} before and uses {threads[1]} now: ditfast's kernels give "
            "identical bits, PyTorch's matrix products may not"
        )
    return lines
