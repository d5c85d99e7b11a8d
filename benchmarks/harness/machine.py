"""Provenance of a measurement: machine, versions, commit, date."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

import ditfast
from ditfast.doctor import attempt, version

CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "driver_version")


def machine(device: str) -> dict:
    """The part that must be equal in two comparable measurements."""
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name()}
    return {"cpu": cpu_model(), "threads": torch.get_num_threads()}


def header(device: str) -> dict:
    """Everything that identifies a measurement. Call it right after the run: an idle GPU lowers its clocks."""
    state, _ = attempt(gpu_state) if device == "cuda" else (None, None)
    return {
        "machine": machine(device),
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores",
        "isa": attempt(isa)[0],
        "gpu_state": state,
        "versions": {
            "ditfast": ditfast.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "cuda": torch.version.cuda,
        },
        "commit": attempt(commit)[0],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def isa() -> str:
    """The instruction set of the CPU kernels."""
    from ditfast.load_extension import load_extension

    return load_extension().isa()


def cpu_model() -> str:
    found, _ = attempt(Path("/proc/cpuinfo").read_text)
    names = [line.split(":")[1].strip() for line in (found or "").splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def gpu_state() -> dict:
    """Clocks, power limit and driver of the GPU in use."""
    uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    query = ["nvidia-smi", "-i", uuid, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    values = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split(",")
    return dict(zip(CLOCKS, map(str.strip, values), strict=True))


def commit() -> str:
    """The commit of this checkout, with "+dirty" if tracked files have changes."""

    def git(*args):
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + ("+dirty" if git("status", "--porcelain", "-uno") else "")
