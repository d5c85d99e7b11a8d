"""Report what runs on this machine, and why the rest does not.

    python -m ditfast.doctor [--json] [--verify]

The last line says whether this machine is ready. The exit status is 0 whatever is missing, and 1 if --verify finds a
wrong kernel or has none to check. Only the standard library is imported at the top and every probe is guarded, so it
starts without torch, triton or the extension.
"""

from ditfast.entry import before_imports, command

if __name__ == "__main__":
    before_imports()

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import ditfast
from ditfast.command import Parser, words
from ditfast.counted import counted
from ditfast.load_extension import load_extension


def attempt(probe: Callable, *args: object) -> tuple[Any, str | None]:
    """Return (the probe's result, None), or (None, why it failed)."""
    try:
        return probe(*args), None
    except ModuleNotFoundError as error:
        return None, f"{error.name or 'a module'} is not installed"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}".split("\n")[0]


def version(module: str) -> str:
    """The version of a module, or why it is missing."""
    found, why = attempt(lambda: str(import_module(module).__version__))
    return found or f"missing ({why})"


def driver_gpus() -> list[dict]:
    """The GPUs seen by the driver; does not need torch."""
    fields = ["name", "compute_cap", "memory.total", "driver_version"]
    query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    keys = ("name", "capability", "memory", "driver")
    return [dict(zip(keys, map(str.strip, line.split(",")), strict=True)) for line in lines]


def torch_gpus() -> list[dict]:
    """The GPUs that torch can use."""
    cuda = import_module("torch").cuda
    if not cuda.is_available():
        return []
    gpus = [cuda.get_device_properties(index) for index in range(cuda.device_count())]
    return [
        {"name": p.name, "capability": f"{p.major}.{p.minor}", "memory": f"{p.total_memory / 2**30:.1f} GiB"}
        for p in gpus
    ]


def why_no_gpu() -> str:
    """Why torch has no GPU."""
    torch = import_module("torch")
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} finds no CUDA device"


def gpus() -> dict:
    """The devices that torch can use; if none, those that the driver lists and why torch cannot use them."""
    driver, _ = attempt(driver_gpus)
    usable, why = attempt(torch_gpus)
    if not usable:
        reason, missing = attempt(why_no_gpu)
        return {"usable": False, "devices": driver or [], "why_not": why or reason or missing}
    if driver:
        usable = [{**gpu, "driver": driver[0]["driver"]} for gpu in usable]  # one driver serves every GPU
    return {"usable": True, "devices": usable, "why_not": None}


def extension() -> dict:
    """How the extension was built, why it does not load, and whether its GPU code runs."""
    config, why = attempt(lambda: dict(load_extension().build_config()))
    probe, failed = attempt(lambda: load_extension().cuda_probe(0))
    return {"build_config": config, "why_not": why, "gpu_code": why or failed or probe or "runs on GPU 0"}


def operations(device_type: str) -> dict:
    """For each op and backend: None if it runs on this device type, else why not; and what auto takes for each op."""

    def probe() -> tuple[dict, dict]:
        ops, why_not = import_module("ditfast.ops").ALL, import_module("ditfast.ops.backends.availability").why_not
        table = {op.name: {name: ask_why_not(why_not, op, name, device_type) for name in op.backends} for op in ops}
        return table, {op.name: automatic(op, table[op.name], device_type) for op in ops}

    found, why = attempt(probe)
    table, auto = found or (None, None)
    return {"device": device_type, "backends": table, "auto": auto, "why_not": why}


def automatic(op: Any, reasons: dict, device_type: str) -> str:
    """What the automatic choice takes for an op, in words, given why each backend does not run."""
    kernels = [name for name in op.kernels if reasons[name] is None]
    if device_type == "cpu":
        precisions = import_module("ditfast.ops.backends.on_cpu").precisions(op) if "host" in kernels else ()
        return f"host ({', '.join(precisions)}), else {op.fallback}" if precisions else op.fallback
    if op.fallback == "sdpa":  # attention is timed
        return f"the fastest of {', '.join([*kernels, 'sdpa'])}" if kernels else "sdpa"
    return f"{kernels[0]}, else {op.fallback}" if kernels else op.fallback


def choices() -> dict:
    """Attention's automatic choices on this GPU so far, with the microseconds measured."""
    torch, cache = import_module("torch"), import_module("ditfast.ops.backends.cache")
    answers = cache.load(torch.device("cuda", torch.cuda.current_device()))
    return {name: answer for name, answer in answers.items() if isinstance(answer, dict)}


def ask_why_not(why_not: Callable, *args: object) -> str | None:
    """The reason that ``why_not`` returns or raises, if any."""
    answer, failed = attempt(why_not, *args)
    return failed or answer


def report() -> dict:
    """Everything the doctor knows, ready for JSON."""
    gpu = gpus()
    return {
        "ditfast": ditfast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{module: version(module) for module in ("torch", "triton", "numpy")},
        "gpu": gpu,
        "extension": extension(),
        "ops": operations("cuda" if gpu["usable"] else "cpu"),
        "choices": (attempt(choices)[0] or {}) if gpu["usable"] else {},
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith("DITFAST_") or name == "TRITON_INTERPRET"
        },
    }


def as_text(found: dict) -> str:
    """Format a `report` for people, each reason once."""
    rows: list[tuple[str, ...]] = [
        (name, found[name]) for name in ("ditfast", "python", "platform", "torch", "triton", "numpy")
    ]

    gpu, ops = found["gpu"], found["ops"]
    rows += [("gpu", pairs(device)) for device in gpu["devices"]]
    if gpu["why_not"] and gpu["why_not"] != ops["why_not"]:
        rows.append(("gpu", f"not usable: {gpu['why_not']}"))

    config, why, gpu_code = found["extension"].values()
    rows += (
        [("extension", f"missing ({why})")] if why else [("extension", pairs(config)), ("", f"gpu code: {gpu_code}")]
    )
    if found["environment"]:
        rows.append(("environment", pairs(found["environment"])))
    lines = align(rows)
    if ops["why_not"]:
        return "\n".join(lines)

    rule = "auto takes a kernel that passes its self-check" + (", on large tensors" if ops["device"] == "cpu" else "")
    lines += ["", f"backends on {ops['device']} tensors; {rule}"]
    rows = [("", "auto", "by name")]
    for op, backends in ops["backends"].items():
        rows.append((op, ops["auto"][op], ", ".join(name for name, why in backends.items() if why is None)))
    lines += align(rows)
    told = {"triton"} if found["triton"].startswith("missing") else set()
    told |= {"cuda", "host"} if why else set()
    if reasons := [pair for pair in missing_backends(ops["backends"]) if pair[0] not in told]:
        lines += ["", "not here", *align(reasons)]
    if found["choices"]:
        rows = [(name, taken["choice"], pairs(taken["us"])) for name, taken in sorted(found["choices"].items())]
        lines += ["", "chosen by time, in microseconds of forward and backward", *align(rows)]
    return "\n".join(lines)


def missing_backends(table: dict) -> list[tuple[str, str]]:
    """Each backend that does not run, with its reason, once."""
    return [*dict.fromkeys((name, why) for each in table.values() for name, why in each.items() if why is not None)]


def verdict(found: dict) -> str:
    """One line: whether ditfast works here, and on which kernels."""
    ops, gpu = found["ops"], found["gpu"]
    if ops["why_not"]:
        return f"Not ready: {ops['why_not']}"
    kernels = {name for each in ops["backends"].values() for name, why in each.items() if why is None}
    kernels &= {"host"} if ops["device"] == "cpu" else {"cuda", "triton"}  # not Triton's interpreter
    how = f"{' and '.join(sorted(kernels))} kernels" if kernels else "plain PyTorch, since no kernel runs here"
    ready = f"eady on {ops['device']} tensors, with {how}"
    return f"Not ready for the GPU, but r{ready}" if gpu["devices"] and not gpu["usable"] else f"R{ready}"


def pairs(mapping: dict) -> str:
    """Names and values on one line."""
    texts = {key: " ".join(value) if isinstance(value, list) else value for key, value in mapping.items()}
    return ", ".join(f"{key} {text or 'none'}" for key, text in texts.items())


def align(rows: list[tuple]) -> list[str]:
    """Left-align all columns except the last."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)][:-1]
    return ["  ".join([*map(str.ljust, row, widths), row[-1]]) for row in rows]


def verify(device_type: str) -> str | None:
    """Check every kernel and print one line per kernel; return what was wrong, None if all are right."""

    def start() -> tuple[int, Iterator]:
        checks = import_module("ditfast.ops.verify")
        return len(checks.kernels_to_check(device_type)), checks.verify_in_subprocess()

    found, why = attempt(start)
    total, results = found or (0, ())
    checked, failed, begin = 0, 0, time.perf_counter()
    if total:
        print(f"\nself-check of {counted(total, 'kernel')}, which takes minutes", flush=True)
    try:
        show_progress(0, total, begin)
        for result in results:
            outcome = "WRONG" if result.was_compared else "could not be checked"
            outcome = "right" if result.reason is None else f"{outcome}: {result.reason}"
            dtypes = f"{result.stream} {result.branch}".replace("torch.", "")
            kernel = f"{result.op}/{result.backend}"
            show_progress()
            print(f"{kernel:42}{dtypes:20}{result.width:6}  {outcome}  ({result.seconds:.1f} s)", flush=True)
            checked += 1
            failed += result.reason is not None
            show_progress(checked, total, begin)
    except RuntimeError as error:
        why = str(error)
    finally:
        show_progress()
    if why:
        return f"{counted(checked, 'kernel was', 'kernels were') if checked else 'nothing was'} verified: {why}"
    return f"{failed} of {counted(checked, 'check')} failed, and auto will not take what failed" if failed else None


def show_progress(checked: int = 0, total: int = 0, begin: float = 0.0) -> None:
    """Write how far the checks are to the last line of a terminal; without arguments, clear it."""
    if not sys.stderr.isatty():
        return
    left = (time.perf_counter() - begin) * (total - checked) / max(checked, 1)
    text = f"{checked} of {total} checked" + (f", about {left:.0f} s left" if checked else "") if total else ""
    print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


@command()
def main() -> None:
    """Run the command line."""
    parser = Parser(prog="python -m ditfast.doctor", description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--verify", action="store_true", help="also rerun every kernel's self-check, which takes minutes"
    )
    arguments = parser.parse_args(words())
    if arguments.json and arguments.verify:
        parser.error("argument --verify: not allowed with --json, since it prints a line per kernel")
    found = report()
    if arguments.json:
        print(json.dumps(found, indent=2, default=str))
        return
    print(as_text(found))
    wrong = None
    if arguments.verify:
        wrong = verify(found["ops"]["device"])
    print(f"\n{verdict(found)}" + (f"; {wrong}" if wrong else "; every kernel is right" if arguments.verify else ""))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
