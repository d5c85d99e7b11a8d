"""Time and peak memory of a training step with a tangent through the model, as MeanFlow and its successors take it.

    python benchmarks/bench_jvp.py [--model DiT-S/2] [--depth 12] [--size 64] [--batch 4] [--dtypes fp32 bf16]

u and its tangent by (x, t) come from torch.func.jvp, the tangent goes into the loss as a constant, and the gradients
of all parameters follow. "explicit" is plain PyTorch, whose attention has tangents where it makes all (B, H, N, N)
weights; "+compile" compiles the function that calls torch.func.jvp. Medians of runs in turns; the peak is what a step
takes on top of what the process held before it (Linux).
"""

import argparse
import ctypes
import re
import sys
from pathlib import Path

import torch
from torch.func import jvp

from ditfast import DiT_models, use_backend
from harness import jsonfile, timing
from harness.arguments import Parser, count, one_of
from harness.machine import header

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
VARIANTS = {"explicit": ("reference", False), "explicit+compile": ("reference", True)}
VARIANTS |= {"ditfast": ("auto", False), "ditfast+compile": ("auto", True)}


def make_model(options, dtype):
    torch.manual_seed(0)
    model = DiT_models[options.model](input_size=options.size, learn_sigma=False)
    del model.blocks[options.depth :]
    for p in model.parameters():  # gates that start at zero would leave the blocks out
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    return model.to(dtype).eval()


def make_step(model, inputs, backend, compiled):
    """A function that leaves gradients and returns u and du."""
    x, t, y, v, dt = inputs

    def with_tangent(x, t, v, dt):
        u, du = jvp(lambda x, t: model(x, t, y), (x, t), (v, dt))
        return u, du.detach()  # inside: a compiled graph has the gradients of all that it returns

    if compiled:
        with_tangent = torch.compile(with_tangent, fullgraph=True)

    def step():
        model.zero_grad()
        with use_backend(backend):
            u, du = with_tangent(x, t, v, dt)
            (u - (v - 0.5 * du)).float().square().mean().backward()
        return u, du

    return step


def peak_mib(step) -> float | None:
    """MiB that a step takes on top of what the process held before; None where nobody tells."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what others have given back
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is held now
    before = _kib(status, "VmRSS")
    step()
    return (_kib(status, "VmHWM") - before) / 1024


def _kib(status, name):
    return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1])


def cases(options, dtype):
    """{variant: case} of one dtype."""
    model = make_model(options, DTYPES[dtype])
    generator = torch.Generator().manual_seed(0)
    shape = options.batch, 4, options.size, options.size
    x, v = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    t, dt = torch.rand(options.batch, generator=generator) * 1000, torch.full((options.batch,), 1000.0)
    inputs = x, t, torch.arange(options.batch), v, dt
    steps = {name: make_step(model, inputs, *VARIANTS[name]) for name in options.variants}
    found = {}
    for name, step in steps.items():
        results = [t.detach().double() for t in step()]
        found.setdefault("first", results)
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(results, found["first"], strict=True)]
        found[name] = {"dtype": dtype, "variant": name, "differs": max(errors), "peak_mib": peak_mib(step)}
    del found["first"]
    for name, ms in timing.measure(steps, options.repeats, "cpu").items():
        found[name]["ms"] = ms
    return list(found.values())


def show(case, best):
    ms, peak = case["ms"]["median"], case["peak_mib"]
    memory = "" if peak is None else f"{peak:9.0f} MiB"
    print(
        f"{case['dtype']:5} {case['variant']:17} {ms:9.1f} ms {memory}  {best / ms:5.2f}x of the better explicit  "
        f"differs by {case['differs']:.1e}",
        flush=True,
    )


def parse(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DiT-S/2", type=one_of(DiT_models))
    parser.add_argument("--depth", default=12, type=count, help="of the model's blocks, how many")
    parser.add_argument("--size", default=64, type=count, help="height and width of the latents")
    parser.add_argument("--batch", default=4, type=count)
    parser.add_argument("--repeats", default=5, type=count)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), type=one_of(DTYPES))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), type=one_of(VARIANTS))
    parser.add_argument("--json", type=Path)
    return parser.parse_args(argv)


def main(argv=None) -> int:
    options = parse(argv)
    found = {"benchmark": "jvp", "options": {k: v for k, v in vars(options).items() if k != "json"}, "cases": []}
    for dtype in options.dtypes:
        new = cases(options, dtype)
        found["cases"] += new
        found["header"] = header("cpu")
        jsonfile.write(options.json, found)
        best = min((c["ms"]["median"] for c in new if c["variant"].startswith("explicit")), default=float("nan"))
        for case in new:
            show(case, best)
    return 0


if __name__ == "__main__":
    sys.exit(main())
