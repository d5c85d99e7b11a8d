"""The cost of a DiT: multiply-adds, FLOPs, parameters, memory kept for backward, and training.

    python -m ditfast.flops [--model DiT-XL/2 | --all] [--conditioning adaln_zero | all] [--image-size 256]
                            [--batch 1] [--dtype bf16] [--train-steps N] [--plot FILE] [--json]

The paper's "Gflops" are multiply-adds of one image's forward, in billions (GMACs): matrix products, including both in
attention, and nothing elementwise. One multiply-add is two FLOPs.
"""

from ditfast.entry import before_imports, command

if __name__ == "__main__":
    before_imports()

import json
import math
import sys

import torch

from ditfast.command import Parser, words
from ditfast.counted import counted
from ditfast.models import DiT_models, cost
from ditfast.models.conditioning import CONDITIONINGS
from ditfast.paths import check_paths

SOURCE = "Peebles & Xie, arXiv 2212.09748: ImageNet 256², 400K training steps, no guidance"
PAPER = {  # model -> Gflops, FID-50K
    "DiT-S/8": (0.36, 153.60), "DiT-S/4": (1.41, 100.41), "DiT-S/2": (6.06, 68.40),
    "DiT-B/8": (1.42, 122.74), "DiT-B/4": (5.56, 68.38), "DiT-B/2": (23.01, 43.47),
    "DiT-L/8": (5.01, 118.87), "DiT-L/4": (19.70, 45.64), "DiT-L/2": (80.71, 23.33),
    "DiT-XL/8": (7.39, 106.41), "DiT-XL/4": (29.05, 43.01), "DiT-XL/2": (118.64, 19.47),
}  # fmt: skip
PAPER_XL_2 = {  # conditioning -> Gflops, FID-50K
    "in_context": (119.37, 35.24), "cross_attention": (137.62, 26.14), "adaln": (118.56, 25.21),
    "adaln_zero": (118.64, 19.47),
}  # fmt: skip


def analyse(
    name: str,
    conditioning: str = "adaln_zero",
    image_size: int = 256,
    batch: int = 1,
    dtype: str = "bf16",
    train_steps: int | None = None,
) -> dict:
    """All costs of one of the paper's models, as JSON values."""
    model = cost.build_on_meta(name, conditioning, image_size)
    macs, kept = cost.macs(model), cost.kept_bytes(model, batch, dtype)
    parts = {"macs": macs, "parameters": cost.parameters(model), "kept_bytes": kept}
    total = {key: sum(values.values()) for key, values in parts.items()}
    _, n, d = model.pos_embed.shape
    published = PAPER_XL_2[conditioning] if name == "DiT-XL/2" else PAPER[name]
    known = image_size == 256 and (conditioning == "adaln_zero" or name == "DiT-XL/2")
    return {
        "model": name,
        "conditioning": conditioning,
        "image_size": image_size,
        "batch": batch,
        "dtype": dtype,
        "tokens": n,
        "dim": d,
        "depth": len(model.blocks),
        "heads": model.num_heads,
        "paper_gflops": total["macs"] / 1e9,
        "published_gflops": published[0] if known else None,
        "published_fid_50k": published[1] if known else None,
        **total,
        "macs": batch * total["macs"],
        "flops": 2 * batch * total["macs"],
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "train_steps": train_steps,
        "training_flops": 2 * cost.training_macs(model, batch, train_steps) if train_steps else None,
        "operators": {op: {key: values[op] for key, values in parts.items()} for op in macs},
    }


def show(results: list[dict]) -> None:
    """Print one model as a table of its operators, several as one line each."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 136, highlight=False)
    console.print(_operators(results[0]) if len(results) == 1 else _models(results))
    for line in _notes(results):
        console.print(line, style="dim")


def _operators(r):
    title = f"{r['model']} {r['image_size']}² · {r['conditioning']} · {counted(r['depth'], 'block')} of "
    table = _table(f"{title}N={r['tokens']} D={r['dim']} H={r['heads']}", ["operator"])
    for name in ("paper Gflops\n= GMACs", "share", "parameters\nM", "kept for backward\nMB"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, op in r["operators"].items():
        if any(op.values()):
            share = op["macs"] / 1e9 / r["paper_gflops"]
            counts = f"{op['parameters'] / 1e6:.2f}", f"{op['kept_bytes'] / 1e6:.1f}"
            table.add_row(name, f"{op['macs'] / 1e9:.3f}", f"{share:.1%}", *counts)
    table.add_section()
    counts = f"{r['parameters'] / 1e6:.2f}", f"{r['kept_bytes'] / 1e6:.1f}"
    table.add_row("all", f"{r['paper_gflops']:.3f}", "100.0%", *counts, style="bold")
    return table


def _models(results):
    table = _table(f"{results[0]['image_size']}² images", ["model", "conditioning"])
    names = "paper Gflops\n= GMACs", "published", "GFLOPs of\nthe batch", "parameters\nM"
    training = ["training,\npaper Gflops", "training\nFLOPs"] if results[0]["training_flops"] else []
    for name in (*names, "trainable\nM", "kept\nMB", "published\nFID-50K", *training):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        published = [f"{r[key]:.2f}" if r[key] else "" for key in ("published_gflops", "published_fid_50k")]
        millions = [f"{r[key] / 1e6:.2f}" for key in ("parameters", "trainable")]
        numbers = f"{r['paper_gflops']:.2f}", published[0], f"{r['flops'] / 1e9:.2f}", *millions
        training = [f"{r['training_flops'] / by:.3g}" for by in (2e9, 1)] if r["training_flops"] else []
        kept = f"{r['kept_bytes'] / 1e6:.1f}"
        table.add_row(r["model"], r["conditioning"], *numbers, kept, published[1], *training)
    return table


def _table(title, columns):
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True)
    return table


def _notes(results):
    r = results[0]
    if len(results) == 1:
        published = f" (published: {r['published_gflops']})" if r["published_gflops"] else ""
        yield f"{r['paper_gflops']:.2f} Gflops as the paper counts them = GMACs{published}"
        yield f"{r['flops'] / 1e9:.2f} GFLOPs, two per multiply-add, batch {r['batch']}"
        yield f"{r['parameters'] / 1e6:.2f} M parameters, {r['trainable'] / 1e6:.2f} M of them trainable"
        if r["training_flops"]:
            paper = f"{r['training_flops'] / 2e9:.3g} Gflops as the paper counts them"
            yield f"training: 3 x forward x batch {r['batch']} x {counted(r['train_steps'], 'step')} = {paper}"
            yield f"  = {r['training_flops']:.3g} FLOPs"
    yield f"kept for backward: batch {r['batch']}, {r['dtype']}, fused kernels; parameters do not count"
    if any(r["published_gflops"] for r in results):
        yield f"published: {SOURCE}"


def correlations(results: list[dict]) -> tuple[float, float]:
    """Pearson correlations of log Gflops with log FID-50K and with FID-50K."""
    gflops = torch.tensor([math.log(r["paper_gflops"]) for r in results], dtype=torch.float64)
    fid = torch.tensor([r["published_fid_50k"] for r in results], dtype=torch.float64)
    both_logs, one_log = (torch.corrcoef(torch.stack([gflops, y]))[0, 1].item() for y in (fid.log(), fid))
    return both_logs, one_log


def plot(path: str) -> None:
    """Plot the paper's FID-50K against Gflops for its twelve models."""
    from matplotlib.figure import Figure

    results = [analyse(name) for name in PAPER]
    both_logs, one_log = correlations(results)
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.add_subplot(
        xscale="log", yscale="log", xlabel="Gflops as the paper counts them (GMACs of an image)"
    )
    axes.set(ylabel="FID-50K (lower is better)", title="DiT: more Gflops, better images")
    for size, colour in zip(("S", "B", "L", "XL"), ("#7fb3d5", "#2e86c1", "#1a5276", "#c0392b"), strict=True):
        mine = [r for r in results if r["model"].startswith(f"DiT-{size}/")]
        axes.plot(*_points(mine), "-", color=colour, alpha=0.35)
        for r in mine:
            patch = r["model"][-1]
            marker, offset = {"8": ("o", (7, 4)), "4": ("s", (7, 4)), "2": ("^", (-26, -14))}[patch]
            axes.plot(*_points([r]), marker, color=colour)
            at = (r["paper_gflops"], r["published_fid_50k"])
            axes.annotate(f"{size}/{patch}", at, offset, textcoords="offset points", color=colour)
    axes.set_yticks([20, 40, 80, 160], ["20", "40", "80", "160"])
    axes.set_xticks([1, 10, 100], ["1", "10", "100"])
    axes.minorticks_off()
    axes.margins(0.08)
    text = f"correlation of the logs {both_logs:.2f}\nof log Gflops and FID {one_log:.2f}"
    axes.text(0.03, 0.05, f"{text} (published: -0.93)", transform=axes.transAxes)
    figure.supxlabel(f"FID: {SOURCE}", fontsize=8, color="gray")
    figure.savefig(path, dpi=150)


def _points(results):
    return [r["paper_gflops"] for r in results], [r["published_fid_50k"] for r in results]


def _parse(arguments):
    parser = Parser(prog="python -m ditfast.flops", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", choices=DiT_models, default="DiT-XL/2", metavar="NAME", help="model, such as DiT-B/4"
    )
    which.add_argument("--all", action="store_true", help="all twelve models")
    kinds = "kind of conditioning (adaln_zero)"
    parser.add_argument("--conditioning", choices=[*CONDITIONINGS, "all"], default="adaln_zero", help=kinds)
    parser.add_argument("--image-size", type=int, default=256, metavar="PIXELS", help="height and width (256)")
    parser.add_argument("--batch", type=int, metavar="B", help="batch size (1)")
    parser.add_argument(
        "--dtype", choices=cost.DTYPES, default="bf16", help="dtype of what is kept for backward (bf16)"
    )
    parser.add_argument(
        "--train-steps", type=int, metavar="N", help="add the cost of N training steps; needs --batch"
    )
    parser.add_argument("--plot", metavar="FILE", help="plot the paper's FID against Gflops to a file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(words(arguments))
    if options.train_steps is not None and options.batch is None:
        parser.error("--train-steps needs --batch")
    for option, number in (("--batch", options.batch), ("--train-steps", options.train_steps)):
        if number is not None and number < 1:
            parser.error(f"{option} must be at least 1, got {number}")
    check_paths(parser, options, "--plot")
    if options.image_size < 64 or options.image_size % 64:
        parser.error(f"--image-size must be a positive multiple of 64, got {options.image_size}")
    return options


@command()
def main(arguments: list[str] | None = None) -> None:
    o = _parse(arguments)
    models = DiT_models if o.all else [o.model]
    kinds = CONDITIONINGS if o.conditioning == "all" else [o.conditioning]
    shared = (o.image_size, o.batch or 1, o.dtype, o.train_steps)
    results = [analyse(name, kind, *shared) for name in models for kind in kinds]
    try:
        if o.json:
            print(json.dumps(results if len(results) > 1 else results[0], indent=2))
        else:
            show(results)
        if o.plot:
            plot(o.plot)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error.name} is not installed: pip install 'ditfast[bench]'")
    except (OSError, ValueError) as error:  # ValueError: matplotlib does not write such files
        sys.exit(f"error: --plot {o.plot} cannot be written: {getattr(error, 'strerror', None) or error}")


if __name__ == "__main__":
    main()
