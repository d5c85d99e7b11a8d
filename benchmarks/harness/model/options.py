"""The command line of bench_model.py."""

import argparse
from pathlib import Path

import torch

from ditfast.models.presets import DiT_models
from harness.arguments import Parser, count, one_of, ratio, require_writable
from harness.block.workload import DTYPES
from harness.compare import load
from harness.model.variants import VARIANTS
from harness.model.workload import MODES, Workload

NAMES = ("model", "image_size", "batch", "dtype", "steps", "repeats")
DEFAULTS = {  # (device, --quick)
    ("cuda", False): ("DiT-XL/2", 256, 32, "bf16", 10, 20),
    ("cuda", True): ("DiT-S/8", 64, 2, "bf16", 2, 2),
    ("cpu", False): ("DiT-S/2", 256, 4, "bf16", 4, 5),
    ("cpu", True): ("DiT-S/8", 64, 2, "fp32", 2, 1),
}


def parse(argv=None) -> argparse.Namespace:
    """The checked options, with ``workload`` and ``old`` (of ``--compare``) filled in."""
    parser = _parser()
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, default in zip(NAMES, DEFAULTS[device, options.quick], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, default)
    options.mode = list(dict.fromkeys(options.mode))
    fast = ("eager", "ditfast") if options.quick else VARIANTS
    options.variants = list(dict.fromkeys(options.variants or fast))
    options.workload = Workload(**{name: getattr(options, name) for name in NAMES[:-1]}, device=device)
    try:
        _check(options)
    except ValueError as error:
        parser.error(error)
    return options


def _check(options):
    step = 8 * options.workload.patch
    if options.image_size % step:
        raise ValueError(f"argument --image-size: must be a multiple of {step}, got {options.image_size}")
    if options.steps > 50:
        raise ValueError(f"argument --steps: must be at most 50, got {options.steps}")
    if options.fail_below is not None and options.compare is None:
        raise ValueError(f"argument --fail-below: needs --compare, got {options.fail_below} alone")
    require_writable(options)
    try:
        options.old = load(options.compare) if options.compare else None
    except ValueError as error:
        raise ValueError(f"argument --compare: {error}") from error


def _parser():
    parser = Parser(prog="bench_model.py", description="Time a whole DiT in eager, torch.compile and ditfast.")
    add = parser.add_argument
    add("--model", type=one_of(DiT_models), metavar="NAME", help="DiT-XL/2 … DiT-S/8 (default XL/2, on the CPU S/2)")
    add("--image-size", type=count, metavar="PIXELS", help="image size; latents are 1/8 of it (default 256)")
    add("--batch", type=count, metavar="N", help="samples (default 32 on a GPU, 4 on the CPU)")
    add("--dtype", choices=DTYPES, help="dtype of weights and inputs; autocast: fp32 under bf16 autocast (bf16)")
    add(
        "--mode", nargs="+", choices=MODES, default=list(MODES), help="; ".join(f"{k}: {v}" for k, v in MODES.items())
    )
    add("--steps", type=count, metavar="N", help="guided steps per run, at most 50 (default 10, on the CPU 4)")
    add("--variants", nargs="+", type=one_of(VARIANTS), metavar="NAME", help=f"any of {', '.join(VARIANTS)}")
    add("--repeats", type=count, metavar="N", help="timed runs per case (default 20, on the CPU 5)")
    add("--quick", action="store_true", help="smoke test: small shapes, few repeats")
    add("--json", type=Path, metavar="FILE", help="write all results, case by case")
    add("--plot", type=Path, metavar="FILE", help="plot images per second of each variant")
    add("--compare", type=Path, metavar="OLD.json", help="print old / new time; exit 2 if machine or workload differ")
    add("--fail-below", type=ratio, metavar="RATIO", help="with --compare: exit 1 if old / new time is lower")
    return parser
