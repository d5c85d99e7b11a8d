"""Compute FID, sFID, Inception Score, precision and recall of samples.

    python -m ditfast.evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz --inception PATH
    python -m ditfast.evaluate --ckpt model --num-samples 5000 --cfg 1.5 --reference images/ --features net.pt
    python -m ditfast.evaluate --reference images/ --inception PATH --save-stats reference.npz

With --ckpt the samples are drawn by python -m ditfast.sample, whose other options are also accepted; images that its
output folder (--out) already contains are not drawn again.
"""

from ditfast.counted import counted
from ditfast.entry import before_imports, command

if __name__ == "__main__":
    before_imports()

import json
import sys
from argparse import Namespace
from collections.abc import Sequence, Set
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch

from ditfast import sample
from ditfast.command import Parser, unknown, words
from ditfast.evaluation import EvaluationError
from ditfast.evaluation.features import INCEPTION, VARIABLE, Extractor, load_extractor, why_no_features
from ditfast.evaluation.images import ImageFolder, ImageNpz, array_names, evenly_spaced, open_images, read_batches
from ditfast.evaluation.report import (
    METRICS,
    PUBLISHED,
    check_dimensions,
    compute_metrics,
    format_report,
    make_report,
    unavailable_metrics,
)
from ditfast.evaluation.statistics import KEPT, Summary, check_new_file, load_statistics, save_statistics, summarize
from ditfast.paths import check_paths
from ditfast.ranks import world_size
from ditfast.sampling.options import make_parser


class Reference(NamedTuple):
    """Contents of --reference: images, statistics, both, or nothing."""

    images: ImageFolder | ImageNpz | None = None
    statistics: Summary | None = None


def evaluate_samples(o: Namespace, drawing: list[str]) -> None:
    """Run the command; ``drawing`` are the arguments of ditfast.sample for --ckpt."""
    if (world := world_size()) > 1:
        raise EvaluationError(
            "evaluate runs as a single process: sample with torchrun first, then evaluate without it "
            f"(WORLD_SIZE is {world})"
        )
    check_new_file("--save-stats", o.save_stats)
    check_inputs(o)
    extractor = load_extractor(o.features, o.inception, o.device, o.trust_torchscript)
    reference = open_reference(o, extractor)
    samples = open_samples(o, drawing)
    if samples is None:
        summarize_reference(o, reference, extractor)
        print(o.save_stats)
        return
    numbers = range(number_of_samples(o, samples))
    metrics, missing = choose_metrics(o, extractor, samples, numbers, reference)
    compared = summarize_reference(o, reference, extractor, metrics)
    keep = numbers if metrics & {"precision", "recall"} else ()
    found = summarize(samples, numbers, extractor, o.batch, "samples", keep, judge="is" in metrics)
    values = compute_metrics(metrics, found, compared, o.device)
    sizes = [images.size for images in (samples, reference.images) if images]
    report = make_report(o, extractor, values, missing, found, compared, sizes)
    print(json.dumps(report, indent=2) if o.json else format_report(report))


def check_inputs(o: Namespace) -> None:
    """Reject files that do not exist, all at once.

    Raises:
        EvaluationError: naming each.
    """
    paths = (("--samples", o.samples), ("--reference", o.reference))
    missing = [f"{option} {path} does not exist" for option, path in paths if path and not Path(path).exists()]
    features = why_no_features(o.features, o.inception)
    if found := [*missing, *([features] if features else [])]:
        raise EvaluationError("; ".join(found))


def open_reference(o: Namespace, extractor: Extractor) -> Reference:
    """Open --reference.

    Raises:
        EvaluationError: it cannot be read or used.
    """
    if o.reference is None:
        return Reference()
    names = array_names("--reference", o.reference)
    statistics = None
    if "mu" in names:
        if o.save_stats:
            raise EvaluationError(f"--save-stats needs images as --reference, got statistics, {o.reference}")
        statistics = load_statistics("--reference", o.reference, extractor)
        if "arr_0" not in names:
            return Reference(None, statistics)
    images = open_images("--reference", o.reference)
    if statistics is None and images.count < 2:
        raise EvaluationError(f"--reference {o.reference} must have at least 2 images, got {images.count}")
    return Reference(images, statistics)


def open_samples(o: Namespace, drawing: list[str]) -> ImageFolder | ImageNpz | None:
    """The images of --samples, or images drawn from --ckpt; None if neither is given."""
    if o.ckpt is None:
        return o.samples and open_images("--samples", o.samples)
    drawn = sample.parse_options(drawing)
    o.samples = Path(drawn.out)
    with redirect_stdout(sys.stderr):  # stdout is for the report
        sample.main(drawing)
    return ImageFolder("--ckpt", [o.samples / f"{i:06d}.png" for i in range(drawn.count)])


def number_of_samples(o: Namespace, samples: ImageFolder | ImageNpz) -> int:
    """How many samples to evaluate; at least 2."""
    count = samples.count if o.num_samples is None else o.num_samples
    if count > samples.count:
        raise EvaluationError(
            f"--num-samples {count}, but --samples {o.samples} has {counted(samples.count, 'image')}"
        )
    if count < 2:
        raise EvaluationError(f"--samples {o.samples} must have at least 2 images, got {count}")
    return count


def choose_metrics(
    o: Namespace, extractor: Extractor, samples: ImageFolder | ImageNpz, numbers: Sequence[int], reference: Reference
) -> tuple[set[str], dict[str, str]]:
    """Returns (metrics to compute, metric -> reason for each that cannot be computed).

    Raises:
        EvaluationError: a metric named in --metrics, or every metric, cannot be computed.
    """
    outputs = extractor(next(read_batches(samples, [0], 1)))
    if reference.statistics:
        check_dimensions(outputs, reference.statistics, f"--reference {o.reference}")
    pictures = reference.images.count if reference.images else 0
    missing = unavailable_metrics(len(numbers), outputs, extractor, reference.statistics, pictures)
    for name in o.metrics or ():
        if name in missing:
            raise EvaluationError(f"--metrics {name} cannot be computed: {missing[name]}")
    metrics = set(o.metrics or METRICS) - missing.keys()
    if not metrics:
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items())
        raise EvaluationError(f"no metric can be computed: {reasons}")
    return metrics, {} if o.metrics else missing


def summarize_reference(
    o: Namespace, reference: Reference, extractor: Extractor, metrics: Set[str] = frozenset()
) -> Summary | None:
    """Summarize the reference as the metrics require; write its statistics to --save-stats if given."""
    images, known = reference
    keep = evenly_spaced(images.count, KEPT) if images and metrics & {"precision", "recall"} else ()
    if images and (keep if known else metrics - {"is"} or o.save_stats):
        found = summarize(images, keep if known else range(images.count), extractor, o.batch, "reference", keep)
        known = known._replace(features=found.features) if known else found
    if o.save_stats and known and images:
        save_statistics("--save-stats", o.save_stats, known, extractor, images)
    return known


def parse_options(arguments: list[str] | None) -> tuple[Namespace, list[str]]:
    """Returns (options, arguments of ditfast.sample); exits with status 2 and one line if an option is invalid."""
    parser = Parser(
        prog="python -m ditfast.evaluate",
        description=__doc__,
        allow_abbrev=False,  # unknown options are for sample
    )
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--samples", metavar="PATH", help="folder of images, or npz with arr_0")
    which.add_argument("--ckpt", metavar="PATH", help="model to draw samples from, as for ditfast.sample")
    add("--reference", metavar="PATH", help="folder of images, npz with arr_0, or statistics: npz with mu and sigma")
    add("--metrics", nargs="+", choices=METRICS, metavar="NAME", help=f"{', '.join(METRICS)} (all that are possible)")
    extractor = parser.add_mutually_exclusive_group()
    extractor.add_argument("--inception", metavar="PATH", help=f"{INCEPTION} (environment variable {VARIABLE})")
    extractor.add_argument("--features", metavar="NET", help="TorchScript file or module:function to use instead")
    trusting = "load a file other than the published Inception; it can do anything you can, such as write files"
    add("--trust-torchscript", action="store_true", help=trusting)
    add("--num-samples", type=int, metavar="N", help="use the first N samples (all; 50000 with --ckpt)")
    add("--batch", type=int, default=32, metavar="B", help="images per batch (32)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="device of the feature network (a GPU if available)",
    )
    add("--save-stats", metavar="FILE", help="write the statistics of --reference to an npz")
    add("--json", action="store_true", help="print the report as JSON")
    o, rest = parser.parse_known_args(words(arguments))
    check_options(parser, o, rest)
    if o.ckpt is None:
        return o, []
    count = PUBLISHED if o.num_samples is None else o.num_samples
    drawing = ["--ckpt", o.ckpt, "--num-samples", str(count), "--batch", str(o.batch), *rest]
    sample.parse_options(drawing)  # exits if one is invalid
    return o, drawing


def check_options(parser: Parser, o: Namespace, rest: list[str]) -> None:
    """Exit through ``parser.error`` if an option is invalid."""
    check_paths(parser, o, "--samples", "--ckpt", "--reference", "--inception", "--features", "--save-stats")
    sampling = make_parser(None)
    if rest and o.ckpt is None:
        hint = "; options of ditfast.sample need --ckpt" if sampling.knows(rest[0]) else ""
        parser.error(unknown(rest, parser.names()) + hint)
    for word in rest:
        if word.startswith("--") and not sampling.knows(word):
            parser.error(unknown([word], parser.names() + sampling.names()))
    if not (o.samples or o.ckpt or (o.reference and o.save_stats)):
        parser.error("--samples or --ckpt is required, or --reference with --save-stats")
    if o.save_stats and not o.reference:
        parser.error("--save-stats needs --reference")
    if o.batch < 1:
        parser.error(f"--batch must be at least 1, got {o.batch}")
    if o.num_samples is not None and o.num_samples < 2:
        parser.error(f"--num-samples must be at least 2, got {o.num_samples}")
    try:
        known = torch.device(o.device).type in ("cpu", "cuda") and torch.zeros(1, device=o.device) is not None
    except (RuntimeError, AssertionError):  # a build without CUDA asserts
        known = False
    if not known:
        parser.error(f"--device must be cpu, cuda or cuda:N, and available, got {o.device}")


@command()
def main(arguments: list[str] | None = None) -> None:
    o, drawing = parse_options(arguments)
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # features in full float32, as published
            evaluate_samples(o, drawing)
    except (EvaluationError, ImportError, ConnectionError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
