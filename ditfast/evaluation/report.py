"""Metrics, reasons for missing ones, and notes on their interpretation."""

from argparse import Namespace
from collections.abc import Collection, Sequence
from typing import Any

import torch

from ditfast.counted import counted
from ditfast.evaluation import EvaluationError
from ditfast.evaluation.features import Extractor
from ditfast.evaluation.metrics import frechet_distance, inception_score, precision_recall
from ditfast.evaluation.statistics import Summary

METRICS = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall"}
NEIGHBOR = 3  # k of precision and recall
PART = 5000  # images per part of the IS
PUBLISHED = 50_000  # samples of published FIDs


def unavailable_metrics(
    count: int, outputs: Collection[str], extractor: Extractor, reference: Summary | None, pictures: int
) -> dict[str, str]:
    """Metric -> reason, for each metric that cannot be computed; known before the work starts.

    Args:
        count: number of samples.
        outputs: names of the extractor's outputs.
        reference: the reference's statistics; None if it has only images or there is no reference.
        pictures: number of images in the reference.
    """
    found = {}
    if reference is None and not pictures:
        found = dict.fromkeys(("fid", "sfid", "precision", "recall"), "no --reference was given")
    elif "spatial" not in outputs:
        found["sfid"] = extractor.why_not("spatial")
    elif reference is not None and reference.spatial is None:
        found["sfid"] = "the reference has no mu_s, sigma_s"
    if "probabilities" not in outputs:
        found["is"] = extractor.why_not("probabilities")
    if reference is not None and not pictures:
        found |= dict.fromkeys(("precision", "recall"), "the reference has no images, arr_0")
    for name, number in (("samples", count), ("reference images", pictures)):
        if 0 < number <= NEIGHBOR:
            found |= dict.fromkeys(("precision", "recall"), f"more than {NEIGHBOR} {name} are needed, got {number}")
    return found


def check_dimensions(outputs: dict[str, torch.Tensor], reference: Summary, where: str) -> None:
    """Reject statistics of features with a different dimension.

    Raises:
        EvaluationError: naming both dimensions.
    """
    for name, gaussian in (("features", reference.gaussian), ("spatial", reference.spatial)):
        if gaussian and name in outputs and len(gaussian[0]) != outputs[name].shape[1]:
            found = outputs[name].shape[1]
            stored = counted(len(gaussian[0]), f"{name} dimension")
            raise EvaluationError(f"{where} has statistics of {stored}, but the extractor returns {found}")


def compute_metrics(
    metrics: set[str], samples: Summary, reference: Summary | None, device: str | torch.device
) -> dict[str, float]:
    """Metric -> value, plus the std of the IS over its parts if there is more than one.

    Args:
        samples, reference: summaries with everything that the metrics need.

    Raises:
        EvaluationError: stored statistics are not a covariance, or probabilities do not sum to 1.
    """
    values: dict[str, float] = {}
    try:
        for name, part in (("fid", "gaussian"), ("sfid", "spatial")):
            if name in metrics:
                values[name] = frechet_distance(*getattr(samples, part), *getattr(reference, part))
        if "is" in metrics:
            assert samples.probabilities is not None and samples.count is not None
            values["is"], spread = inception_score(samples.probabilities, PART)
            values |= {"is_std": spread} if samples.count > PART else {}
        if metrics & {"precision", "recall"}:
            assert reference is not None and reference.features is not None and samples.features is not None
            both = precision_recall(reference.features.to(device), samples.features.to(device), NEIGHBOR)
            values |= dict(zip(("precision", "recall"), both, strict=True))
    except ValueError as error:
        raise EvaluationError(f"{', '.join(sorted(metrics - values.keys()))}: {error}") from error
    return {name: value for name, value in values.items() if name in metrics or name == "is_std"}


def notes(
    metrics: dict[str, float], samples: Summary, reference: Summary | None, sizes: Sequence[tuple[int, int]]
) -> list[str]:
    """Reasons why these values differ from published ones.

    Args:
        sizes: (H, W) of the samples and, if it has images, of the reference.
    """
    assert samples.count is not None
    found: list[str] = []
    counts = [side.count for side in (samples, reference) if side is not None and side.count is not None]
    for name, part in (("fid", "gaussian"), ("sfid", "spatial")):
        if name in metrics and min(counts) <= len(getattr(samples, part)[0]):
            found.append(
                f"{METRICS[name]} is biased upward: the covariance of {min(counts)} images in "
                f"{counted(len(getattr(samples, part)[0]), 'dimension')} is singular"
            )
    if metrics.keys() & {"fid", "sfid"} and samples.count < PUBLISHED:
        found.append(f"FID and sFID fall with the number of samples: published values use {PUBLISHED}")
    if "is" in metrics and samples.count % PART:
        found.append(f"IS is lower for few images: parts have {PART} images, the last one {samples.count % PART}")
    if len(set(sizes)) > 1:
        found.append("the samples are {1} x {0}, the reference is {3} x {2}".format(*sizes[0], *sizes[1]))
    return found


def make_report(
    o: Namespace,
    extractor: Extractor,
    values: dict[str, float],
    missing: dict[str, str],
    samples: Summary,
    reference: Summary | None,
    sizes: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    """The report as JSON values."""
    assert samples.gaussian is not None
    pictures = None if reference is None or reference.features is None else len(reference.features)
    return {
        "metrics": values,
        "missing": missing,
        "samples": {"path": str(o.samples), "count": samples.count},
        "reference": reference and {"path": str(o.reference), "count": reference.count, "pictures": pictures},
        "features": {
            "name": extractor.name,
            "identity": extractor.identity,
            "dimensions": len(samples.gaussian[0]),
        },
        "notes": notes(values, samples, reference, sizes),
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    values, rows = report["metrics"], []
    for name, title in METRICS.items():
        if name in values:
            spread = f" ± {values['is_std']:.4f}" if name == "is" and "is_std" in values else ""
            rows.append(f"{title:<10}{values[name]:>10.4f}{spread}")
    rows += [f"{METRICS[name]:<10}{'–':>10}  {why}" for name, why in report["missing"].items()]
    samples, reference, features = report["samples"], report["reference"], report["features"]
    rows.append(f"samples: {samples['count']} images from {samples['path']}")
    if reference:
        count = reference["count"] or "an unknown number of"
        seen = f", {reference['pictures']} of them for precision and recall" if reference["pictures"] else ""
        rows.append(f"reference: {count} images from {reference['path']}{seen}")
    names = dict.fromkeys((features["name"], features["identity"]))  # for a function they are equal
    rows.append(f"features: {', '.join(names)}, {counted(features['dimensions'], 'dimension')}")
    return "\n".join(rows + [f"note: {note}" for note in report["notes"]])
