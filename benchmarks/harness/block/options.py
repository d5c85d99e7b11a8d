"""The command line of bench_block.py."""

import argparse
from pathlib import Path

import torch

from ditfast.models.presets import DiT_models
from harness import resuming
from harness.arguments import Parser, count, one_of, ratio, require_writable
from harness.block import variants
from harness.block.workload import DTYPES, RUN, Workload
from harness.compare import load

DEFAULT_NAMES = ("model", "image_size", "batch", "blocks", "dtype", "repeats")
DEFAULTS = {  # (device, --quick)
    ("cuda", False): ("DiT-XL/2", 256, 64, 4, "bf16", 50),
    ("cuda", True): ("DiT-S/2", 64, 8, 2, "bf16", 5),
    ("cpu", False): ("DiT-XL/2", 256, 1, 1, "fp32", 7),
    ("cpu", True): ("DiT-S/2", 64, 2, 2, "fp32", 3),
}
DEFAULT_VARIANTS = {
    ("cuda", False): variants.VARIANTS,
    ("cpu", False): ("eager", "compile", variants.TUNED, "ditfast", "ditfast+compile"),
    ("cuda", True): ("eager", "ditfast"),
    ("cpu", True): ("eager", "ditfast"),
}


def parse(argv=None) -> argparse.Namespace:
    """The checked options, with ``workload``, ``old`` (of ``--compare``) and ``official_block`` filled in."""
    parser = _parser()
    options = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind = (device, options.quick)
    for name, default in zip(DEFAULT_NAMES, DEFAULTS[kind], strict=True):
        if getattr(options, name) is None:
            setattr(options, name, default)
    options.mode = list(dict.fromkeys(options.mode))
    options.variants = list(dict.fromkeys(options.variants or DEFAULT_VARIANTS[kind]))
    options.workload = Workload(**{name: getattr(options, name) for name in DEFAULT_NAMES[:-1]}, device=device)
    try:
        _check(options)
    except ValueError as error:
        parser.error(error)
    return options


def _check(options):
    step = 8 * options.workload.patch
    if options.image_size % step:
        raise ValueError(f"argument --image-size: must be a multiple of {step}, got {options.image_size}")
    if options.fail_below is not None and options.compare is None:
        raise ValueError(f"argument --fail-below: needs --compare, got {options.fail_below} alone")
    require_writable(options)
    options.old = _named("--compare", load, options.compare) if options.compare else None
    options.official_block = _named("--official", variants.load_official, options.official)
    if options.official:
        options.variants.append("official")


def _named(flag, function, value):
    try:
        return None if value is None else function(value)
    except ValueError as error:
        raise ValueError(f"argument {flag}: {error}") from error


def _parser():
    parser = Parser(prog="bench_block.py", description="Time DiT blocks in eager, torch.compile and ditfast.")
    add = parser.add_argument
    add("--model", type=one_of(DiT_models), metavar="NAME", help="DiT-XL/2 … DiT-S/8 (default DiT-XL/2)")
    add("--image-size", type=count, metavar="PIXELS", help="image size; latents are 1/8 of it (default 256)")
    add("--batch", type=count, metavar="N", help="samples (default 64 on a GPU, 1 on the CPU)")
    add("--blocks", type=count, metavar="N", help="blocks in the stack (default 4 on a GPU, 1 on the CPU)")
    add(
        "--dtype",
        choices=DTYPES,
        help="dtype of weights and inputs; autocast: fp32 under bf16 autocast (default bf16, on the CPU fp32)",
    )
    add("--mode", nargs="+", choices=RUN, default=list(RUN), help="forward without gradients; forward and backward")
    add(
        "--variants",
        nargs="+",
        type=one_of(variants.VARIANTS),
        metavar="NAME",
        help=f"any of {', '.join(variants.VARIANTS)}",
    )
    add("--repeats", type=count, metavar="N", help="timed runs per case (default 50, on the CPU 7)")
    add("--quick", action="store_true", help="smoke test: small shapes, few repeats")
    add("--official", metavar="DIR", help="also time the DiTBlock of this checkout of the original (needs timm)")
    add("--deadline", type=count, metavar="SECONDS", help="start no case after this; report how many were skipped")
    add("--json", type=Path, metavar="FILE", help="write all results, case by case")
    resuming.add_option(parser)
    add("--plot", type=Path, metavar="FILE", help="plot TFLOP/s of the variants and the GEMM ceiling")
    add("--compare", type=Path, metavar="OLD.json", help="print old / new time; exit 2 if machine or workload differ")
    add("--fail-below", type=ratio, metavar="RATIO", help="with --compare: exit 1 if old / new time is lower")
    return parser
