"""The backends of a run: a run that goes on takes those that it began with, where this machine has them."""

import torch

from ditfast import ops
from ditfast.ops.backends import on_cpu
from ditfast.ops.backends.availability import why_not
from ditfast.ops.backends.choice import names_in_force, repeat_choices
from ditfast.training import TrainError


def check_backend(name: str | None, device: str) -> None:
    """Refuse a backend that is none, or that no operation has here.

    Raises:
        TrainError: with the reason.
    """
    try:
        names_in_force(name)
    except ValueError as error:
        variable = "" if str(error).startswith("DITFAST") else "--"
        raise TrainError(f"{variable}{error}") from error
    for op in ops.ALL:
        reason = name in op.backends and why_not(op, name, device.split(":")[0])
        if reason:
            raise TrainError(f"--backend {name} cannot run: {reason}")


def chosen_backends(ran: dict[str, list[str]]) -> dict[str, str]:
    """Operation -> the backend of its forward, from what `ditfast.ops.backends.log.record` collected."""
    chosen = {op: names[0] for op, names in sorted(ran.items())}
    if "attention" in chosen:
        chosen.setdefault("qkv_attention", chosen["attention"])  # without a kernel it is a Linear, and attention
    return chosen


def repeat_backends(then: dict[str, str], device_type: str) -> list[str]:
    """Let the automatic choice take the backends of a checkpoint: why it cannot, a line for each that is not here."""
    usable, missing = {}, []
    for op in ops.ALL:
        name = then.get(op.name)
        reason = None if name is None else why_not(op, name, device_type)
        if reason is not None:
            missing.append(f"{op.name} ran on {name} before, which cannot run here: {reason}")
        elif name is not None:
            usable[op.name] = name
    repeat_choices(usable)
    return missing


def describe_cpu(device: str) -> dict | None:
    """What else decides the bits of a run on the CPU: the kernels' instruction set, and the threads."""
    return {"isa": on_cpu.isa(), "threads": torch.get_num_threads()} if device == "cpu" else None


def compare_cpu(then: dict | None, now: dict | None) -> list[str]:
    """In a line each, what is no more as it was when a checkpoint was written; nothing if it does not say."""
    if not then or not now:
        return []
    isas, threads = ((then[name], now[name]) for name in ("isa", "threads"))
    lines = []
    if isas[0] != isas[1]:
        lines.append(f"the CPU's kernels were those of {isas[0]}, are those of {isas[1]}: sums are rounded otherwise")
    if threads[0] != threads[1]:
        lines.append(
            f"threads were {threads[0]}, are {threads[1]}: ditfast's kernels give the same bits, PyTorch's matrix "
            "products need not"
        )
    return lines
