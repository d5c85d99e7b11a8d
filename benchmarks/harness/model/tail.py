"""Time the end of a training step, part by part, relative to a copy.

In benchmarks/: python -m harness.model.tail [--model NAME] [--dtype DTYPE] [--json FILE]
"""

import sys
from pathlib import Path

import torch

from ditfast.heap import keep_freed_memory
from ditfast.models.presets import DiT_models
from ditfast.training.weights import Weights, norm_of
from harness import jsonfile, timing
from harness.arguments import Parser, count, one_of
from harness.machine import header
from harness.model.training import DECAY, make_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# bytes per parameter that a part must read and write; all float32, except bf16 weights and their gradients
BYTES = {"cast gradients": 6, "norm": 4, "AdamW": 28, "average": 12, "cast weights": 6, "copy": 8}
BYTES_LOW = {**BYTES, "norm": 2}  # where weights and their gradients are bf16


def make_parts(weights: Weights, is_low: bool) -> dict:
    """{part: a function that does it}, on random gradients; the casts only if the weights are not float32."""
    params, masters, average = (list(d.values()) for d in (weights.params, weights.masters, weights.average))
    gradients, optimizer = [torch.randn_like(value) for value in masters], weights.optimizer
    for value, gradient in zip(masters, gradients, strict=True):
        value.grad = gradient
    optimizer.found_inf, optimizer.grad_scale = (torch.full((), x, device=masters[0].device) for x in (0.0, 2.0))
    source = torch.cat([value.flatten() for value in masters])
    target = torch.empty_like(source)
    found = [g.to(p.dtype) for g, p in zip(gradients, params, strict=True)]  # as backward leaves them
    parts = {
        "norm": lambda: norm_of(found),
        "AdamW": optimizer.step,
        "average": lambda: torch._foreach_lerp_(average, masters, 1 - DECAY),
        "copy": lambda: target.copy_(source),
    }
    if is_low:

        def cast_gradients():  # into new memory, as in each step
            torch._foreach_copy_([torch.empty_like(value) for value in masters], found)

        parts |= {"cast gradients": cast_gradients, "cast weights": weights.copy_masters}
    return parts


def run(model: torch.nn.Module, repeats: int) -> dict:
    p = next(model.parameters())
    weights, is_low, device = make_weights(model), p.dtype != torch.float32, p.device.type
    elements = sum(value.numel() for value in weights.masters.values())
    times = timing.measure(make_parts(weights, is_low), repeats, device, warmup=2)
    moved = {part: each * elements for part, each in (BYTES_LOW if is_low else BYTES).items()}
    rates = {part: moved[part] / ms["median"] / 1e6 for part, ms in times.items()}
    parts = [
        {"part": part, "bytes": moved[part], "ms": times[part], "gb_per_s": rates[part]}
        | {"of_copy": rates["copy"] / rates[part]}
        for part in BYTES
        if part in times
    ]
    return {"schema": 1, "benchmark": "tail", "header": header(device), "parts": parts, "notes": []}


def main(argv=None) -> int:
    parser = Parser(prog="tail.py", description="Time the parts of a training step after backward against a copy.")
    add = parser.add_argument
    add("--model", default="DiT-S/2", type=one_of(DiT_models), metavar="NAME", help="DiT-XL/2 … DiT-S/8 (DiT-S/2)")
    add("--dtype", default="fp32", choices=DTYPES, help="dtype of the weights; masters are float32 (fp32)")
    add("--repeats", default=9, type=count, metavar="N", help="timed runs per part (9)")
    add("--json", type=Path, metavar="FILE", help="write all results")
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        keep_freed_memory()  # as ditfast.train does
    result = run(DiT_models[options.model]().to(device, DTYPES[options.dtype]), options.repeats)
    jsonfile.write(options.json, result)
    for part in result["parts"]:
        print(
            f"{part['part']:15} {part['bytes'] / 2**20:7.0f} MiB  {part['ms']['median']:8.2f} ms  "
            f"{part['gb_per_s']:8.1f} GB/s  {part['of_copy']:5.2f}x a copy's time"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
