"""Run every GPU kernel on small inputs under compute-sanitizer, which finds bad accesses and races.

In benchmarks/: python -m harness.sanitize [--deadline SECONDS] [--quick] [--json FILE]
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from harness import jsonfile
from harness.arguments import Parser, count
from harness.machine import header
from harness.problems import MLP_PASSES, Problem, gpu_kernels

ALONE = "alone"  # without a tool: compiles the kernels, and tells their own failures from what the tools find
TOOLS = (ALONE, "memcheck", "racecheck")
GEMMS = ("mlp", "patch_embed", "qkv_attention")  # mostly the library's kernels; their own run in other operations too
SIZES = {  # (B, N, D): odd numbers of tokens, both head dims, more tiles than stay in shared memory
    False: {"attention": [(2, 65, 72), (1, 257, 128), (1, 321, 72)], "": [(2, 37, 1152), (3, 4, 72)]},
    True: {"attention": [(1, 9, 72)], "": [(2, 4, 72)]},
}
ERRORS = 9  # exit status of compute-sanitizer after it found some
TAIL = 20  # lines to keep of its output


def problems(is_quick: bool, device: str):
    """(problem, backend) of every kernel."""
    for name, backend, dtype in gpu_kernels():
        if name in GEMMS or dtype != ("fp32" if is_quick else "bf16") or is_quick and backend != "triton":
            continue  # the interpreter truncates to bf16
        for size in SIZES[is_quick].get(name, SIZES[is_quick][""]):
            if "patchify" not in name or round(size[1] ** 0.5) ** 2 == size[1]:  # images here are square
                yield Problem(name, *size, dtype, device), backend
    for name in MLP_PASSES:
        yield Problem(name, *SIZES[is_quick][""][0], "fp32" if is_quick else "bf16", device), "triton"


def run_kernels(is_quick: bool) -> int:
    """Run them all in this process; return how many."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    done = [problem.results(backend) for problem, backend in problems(is_quick, device)]
    if device == "cuda":
        torch.cuda.synchronize()
    return len(done)


def check(tool: str, seconds: float, is_quick: bool) -> dict:
    """Run `run_kernels` under a tool."""
    command = [sys.executable, "-m", "harness.sanitize", "--kernels", *(["--quick"] if is_quick else [])]
    if tool != ALONE:
        options = "--tool", tool, "--error-exitcode", str(ERRORS), "--print-limit", "20"
        options += ("--report-api-errors", "no") if tool == "memcheck" else ()  # PyTorch tries calls that may fail
        command = ["compute-sanitizer", *options, *command]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that each tensor has bounds of its own
    start, streams = time.monotonic(), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        done = subprocess.run(command, env=environment, timeout=seconds, text=True, errors="replace", **streams)
        why, output = None if done.returncode == 0 else f"exit status {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as late:
        why, output = f"did not end within {seconds:.0f} s", (late.stdout or b"").decode(errors="replace")
    found = {"tool": tool, "why": why, "seconds": round(time.monotonic() - start, 1)}
    return found | {"tail": [line[:200] for line in output.splitlines()[-TAIL:]]}


def run(options) -> dict:
    end = time.monotonic() + (options.deadline or 600)
    result = {"schema": 1, "benchmark": "sanitize", "header": header("cuda" if torch.cuda.is_available() else "cpu")}
    result |= {"tools": []}
    tools = TOOLS[:1] if options.quick else TOOLS
    for done, tool in enumerate(tools):
        share = max(1.0, (end - time.monotonic()) / (len(tools) - done))
        result["tools"].append(check(tool, share, options.quick))
        jsonfile.write(options.json, result)
    return result


def main(argv=None) -> int:
    parser = Parser(prog="sanitize.py", description="Run every GPU kernel on small inputs under compute-sanitizer.")
    parser.add_argument("--quick", action="store_true", help="rehearse without a GPU and without compute-sanitizer")
    parser.add_argument("--kernels", action="store_true", help="run the kernels in this process, and exit")
    parser.add_argument("--deadline", type=count, metavar="SECONDS", help="for all tools together (default 600)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the tools found")
    options = parser.parse_args(argv)
    if options.kernels:
        print(f"{run_kernels(options.quick)} problems")
        return 0
    if not options.quick and shutil.which("compute-sanitizer") is None:
        parser.error("compute-sanitizer was not found: it comes with the CUDA toolkit")
    found = run(options)["tools"]
    for tool in found:
        print(f"{tool['tool']}: {tool['why'] or 'no errors'} ({tool['seconds']} s)", *tool["tail"][-3:], sep="\n  ")
    return 1 if any(tool["why"] for tool in found) else 0


if __name__ == "__main__":
    sys.exit(main())
