"""The options of `python -m ditfast.sample`."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from ditfast.checkpoints.sampling import OBJECTIVES
from ditfast.command import Parser, words
from ditfast.diffusion.schedule import SCHEDULES
from ditfast.paths import check_paths
from ditfast.sampling import solvers, speed
from ditfast.sampling.demo import DEMO, ONE_STEP
from ditfast.sampling.sampler import SAMPLERS

MOST_IMAGES = 10**7  # each is a file, and an integer in memory
MOST_PIXELS = 2**16  # per side


def parse_options(arguments: list[str] | None, description: str | None) -> Namespace:
    """The options, with the demo's defaults under --demo; exits with status 2 and one line if one is invalid."""
    arguments = words(arguments)
    parser = make_parser(description)
    o = parser.parse_args(arguments)
    if o.demo:
        parser.set_defaults(**DEMO | (ONE_STEP if o.one_step else {}))
        o = parser.parse_args(arguments)
        o.grid = f"{Path(o.out)}.png" if o.grid is None else o.grid
    if o.num_samples is not None:
        o.classes = None  # drop the demo's
    o.count = len(o.classes) if o.classes else o.num_samples
    check_options(parser, o)
    return o


def make_parser(description: str | None) -> Parser:
    parser = Parser(prog="python -m ditfast.sample", description=description)
    add = parser.add_argument
    add("--demo", action="store_true", help="sample handwritten digits to demo.png; needs no other option")
    add("--one-step", action="store_true", help="with --demo: sample from a MeanFlow model, one call per digit")
    add("--ckpt", metavar="PATH", help="a folder, a file, a released name, or a name on the Hub")
    size: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "PIXELS"}
    add("--image-size", **size, help="side, or height and width (the checkpoint's)")
    add("--num-heads", type=int, metavar="N", help="attention heads, if a bare weights file leaves them open")
    no_null = "the label table of a bare weights file has no row for the null label, by default its last"
    add("--no-null-label", action="store_true", help=no_null)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--classes", type=int, nargs="+", metavar="K", help="class labels, one per sample")
    which.add_argument("--num-samples", type=int, metavar="N", help="number of samples, of random classes")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument("--seed", type=int, default=0, metavar="S", help="sample i uses the seed S + i (0)")
    seeds.add_argument("--seeds", type=int, nargs="+", metavar="S", help="seeds, one per sample, instead of --seed")
    add("--objective", choices=OBJECTIVES, help="training objective, if the model does not record it (diffusion)")
    steps = f"sampling steps (250; one-step: 1; {solvers.ODE} with an adaptive method: as many as it needs)"
    add("--steps", type=int, metavar="N", help=steps)
    of_flows, of_means = (", ".join(names) for names in (solvers.FLOW_SAMPLERS, solvers.MEAN_SAMPLERS))
    samplers = f"""diffusion: {", ".join(SAMPLERS)} or a diffusers scheduler class (ddpm); flows: {of_flows} (euler);
    meanflow: those of flows, {of_means} (one-step)"""
    add("--sampler", metavar="NAME", help=samplers)
    solvers.add_options(add)
    add("--noise-schedule", choices=SCHEDULES, help="that of the training, if the model does not record it (linear)")
    add("--cfg", type=float, metavar="SCALE", help="classifier-free guidance scale, 1 for none (4; meanflow: 1)")
    interval: dict[str, Any] = {"type": float, "nargs": 2, "default": (0.0, 1.0), "metavar": ("LO", "HI")}
    add("--cfg-interval", **interval, help="guide only at times in [LO, HI]: 0 is clean, 1 is noise (0 1)")
    guided = "guide only the first C channels (3 of 4, as for the released samples; else all)"
    add("--cfg-channels", type=int, metavar="C", help=guided)
    speed.add_options(add)
    add("--batch", type=int, default=32, metavar="B", help="images per batch (32)")
    vae = "for latents: ema, mse or an AutoencoderKL's folder (that of a pipeline as --ckpt, else ema)"
    add("--vae", metavar="NAME", help=vae)
    add("--decoder", choices=("vae", "pixel"), help="what decodes samples, if the model does not record it (vae)")
    mismatch = "allow a noise schedule, VAE, decoder, image size or guidance other than the model's"
    add("--allow-mismatch", action="store_true", help=mismatch)
    add("--out", default="samples", metavar="DIR", help="output folder of PNGs (samples)")
    add("--grid", metavar="FILE", help="write the first 64 images as one PNG (none; demo: --out with .png)")
    add("--gif", metavar="FILE", help="animate how the first 64 images come about, each decoded up to 50 times more")
    add("--grid-columns", type=int, metavar="N", help="images per row of grid and GIF (about a square)")
    add("--grid-scale", type=int, default=1, metavar="N", help="enlarge each pixel of grid and GIF to N x N (1)")
    add("--npz", metavar="FILE", help="write all images as an .npz for ADM's evaluator")
    add("--take-over", action="store_true", help="take the folder over from a run that is certainly dead")
    add(
        "--overwrite",
        action="store_true",
        help="replace the grid, the GIF, the npz, and a folder with other settings",
    )
    return parser


def check_options(parser: Parser, o: Namespace) -> None:
    """Exit through ``parser.error`` if an option is missing or invalid."""
    if o.one_step and not o.demo:
        parser.error("--one-step needs --demo; for your own model use --sampler one-step")
    if o.ckpt is None:
        parser.error("--ckpt is required, or --demo, which needs no weights")
    if o.count is None:
        parser.error("one of the arguments --classes --num-samples is required")
    check_paths(parser, o, "--ckpt", "--vae", "--out", "--grid", "--gif", "--npz")
    if o.image_size is not None and len(o.image_size) > 2:
        parser.error(f"--image-size must be a side, or height and width, got {len(o.image_size)} numbers")
    if o.image_size is not None and max(o.image_size) > MOST_PIXELS:
        parser.error(f"--image-size must be at most {MOST_PIXELS}, got {max(o.image_size)}")
    positive = {"--num-samples": o.count, "--num-heads": o.num_heads, "--batch": o.batch, "--steps": o.steps}
    positive |= {"--grid-columns": o.grid_columns, "--grid-scale": o.grid_scale}
    for option, value in positive.items():
        if value is not None and value < 1:
            parser.error(f"{option} must be at least 1, got {value}")
    if o.count > MOST_IMAGES:
        parser.error(f"--num-samples must be at most {MOST_IMAGES}, got {o.count}")
    if o.seeds and len(o.seeds) != o.count:
        parser.error(f"--seeds must list one seed per sample: expected {o.count}, got {len(o.seeds)}")
    for option, seeds in (("--seed", (o.seed, o.seed + o.count - 1)), ("--seeds", o.seeds or (0,))):
        if not 0 <= min(seeds) <= max(seeds) < 2**32:  # the CPU's generator keeps 32 bits of a seed
            parser.error(f"{option} must be in [0, {2**32 - 1}], got {min(seeds)} to {max(seeds)}")
    if o.cfg is not None and not 1 <= o.cfg < float("inf"):
        parser.error(f"--cfg must be at least 1, got {o.cfg}")
    speed.check_options(parser, o)
    low, high = o.cfg_interval
    if not 0 <= low <= high <= 1:
        parser.error(f"--cfg-interval must be 0 <= LO <= HI <= 1, got {low} {high}")
