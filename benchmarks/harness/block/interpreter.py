"""Check the Triton kernels without a GPU: small blocks in Triton's interpreter, compared with float64.

Prints one JSON object.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from ditfast.ops import contract, use_backend
from ditfast.ops.backends.log import record
from harness.block import parity, variants
from harness.block.workload import Workload, forward_backward, make_blocks, make_inputs
from harness.interpreting import choose_interpreter

BENCHMARKS = Path(__file__).parents[2]
SECONDS = 600

WORKLOAD = {"model": "DiT-S/8", "image_size": 320, "batch": 3, "blocks": 2, "device": "cpu"}  # N = 25


def prove(dtype: str) -> dict:
    workload = Workload(dtype=dtype, **WORKLOAD)
    blocks, inputs = make_blocks(workload), make_inputs(workload)
    plain, ours = variants.build("eager", workload, blocks), variants.build("ditfast", workload, blocks)
    low, ref = forward_backward(plain, workload, inputs), parity.reference(blocks, inputs)
    with use_backend("triton"), record() as ran:
        got = forward_backward(ours, workload, inputs)
    worst = contract.worst(parity.compare(parity.names(plain), got, low, ref))
    return {
        "workload": workload.as_dict(),
        "parity": worst,
        "backends": {op: sorted(set(b)) for op, b in ran.items()},
    }


def in_subprocess(dtype: str) -> dict:
    """Run `prove` in a process where Triton interprets, in fp32 instead of bf16; {"error": …} if that fails."""
    if dtype != "fp16":
        dtype = "fp32"  # the interpreter truncates to bf16 where a GPU rounds
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # not 0
    command = [sys.executable, "-m", "harness.block.interpreter", dtype]
    options = {"capture_output": True, "text": True, "timeout": SECONDS}
    try:
        done = subprocess.run(command, cwd=BENCHMARKS, env=environment, **options)
        if done.returncode:
            return {"error": (done.stderr.strip() or "no message").splitlines()[-1]}
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {SECONDS} s"}
    except (ValueError, IndexError):
        return {"error": f"printed, instead of JSON, {done.stdout[-200:]!r}"}


if __name__ == "__main__":
    choose_interpreter()
    torch.set_num_threads(1)
    print(json.dumps(prove(sys.argv[1])))
