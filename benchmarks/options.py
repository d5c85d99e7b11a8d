"""The command line of bench_block.py. Every mistake is one line that names the argument, the rule and the value."""

import argparse
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

import torch
import variants
from compare import load
from workload import DTYPES, PASSES, Workload

from ditfast.models.presets import DiT_models

DEFAULT_NAMES = ("model", "image_size", "batch", "blocks", "dtype", "repeats")
DEFAULTS = {  # (device, --quick)
    ("cuda", False): ("DiT-XL/2", 256, 64, 4, "bf16", 50),
    ("cuda", True): ("DiT-S/2", 64, 8, 2, "bf16", 5),
    ("cpu", False): ("DiT-XL/2", 256, 1, 1, "fp32", 7),
    ("cpu", True): ("DiT-S/2", 64, 2, 2, "fp32", 3),
}
DEFAULT_VARIANTS = {
    ("cuda", False): variants.VARIANTS,
    ("cpu", False): ("eager", "compile", "ditfast", "ditfast+compile"),
    ("cuda", True): ("eager", "ditfast"),
    ("cpu", True): ("eager", "ditfast"),
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


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
    if options.plot and find_spec("matplotlib") is None:
        raise ValueError("argument --plot: needs matplotlib, which is not installed: pip install 'ditfast[bench]'")
    for flag in ("json", "plot"):
        path = getattr(options, flag)
        if path and not path.parent.is_dir():
            raise ValueError(f"argument --{flag}: must be in a folder that exists, got {str(path)!r}")
    options.old = _named("--compare", load, options.compare) if options.compare else None
    options.official_block = _named("--official", variants.load_official, options.official)
    if options.official:
        options.variants.append("official")


def _named(flag, function, value):
    try:
        return None if value is None else function(value)
    except ValueError as error:
        raise ValueError(f"argument {flag}: {error}") from error


def _one_of(names):
    def check(text):
        if text not in names:
            near = get_close_matches(text, names, n=1, cutoff=0)[0]
            rule = f"must be one of {', '.join(names)}"
            raise argparse.ArgumentTypeError(f"{rule}; got {text!r}, did you mean {near}?")
        return text

    return check


def _count(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1, got {text!r}")
    return int(text)


def _ratio(text):
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number > 0, got {text!r}")
    return value


def _parser():
    parser = Parser(prog="bench_block.py", description="Time DiT blocks in eager, torch.compile and ditfast.")
    add = parser.add_argument
    add("--model", type=_one_of(DiT_models), metavar="NAME", help="DiT-XL/2 … DiT-S/8 (default DiT-XL/2)")
    add("--image-size", type=_count, metavar="PIXELS", help="the latent is an eighth of it (default 256)")
    add("--batch", type=_count, metavar="N", help="samples (default 64 on a GPU, 1 on the CPU)")
    add("--blocks", type=_count, metavar="N", help="blocks in the stack (default 4 on a GPU, 1 on the CPU)")
    add("--dtype", choices=DTYPES, help="of weights and inputs; autocast: fp32 under bf16 autocast (bf16, CPU: fp32)")
    add("--mode", nargs="+", choices=PASSES, default=list(PASSES), help="forward without gradients, and with them")
    add(
        "--variants",
        nargs="+",
        type=_one_of(variants.VARIANTS),
        metavar="NAME",
        help=f"of {', '.join(variants.VARIANTS)}",
    )
    add("--repeats", type=_count, metavar="N", help="timed runs of each case (default 50, on the CPU 7)")
    add("--quick", action="store_true", help="small shapes and few repeats, to see that everything runs")
    add("--official", metavar="DIR", help="also time the DiTBlock of this checkout of the original (needs timm)")
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    add("--plot", type=Path, metavar="FILE", help="draw the variants as bars under the GEMM ceiling")
    add("--compare", type=Path, metavar="OLD.json", help="print old over new time; exit 2 if machine or work differ")
    add("--fail-below", type=_ratio, metavar="RATIO", help="with --compare: exit 1 if old over new time is below")
    return parser
