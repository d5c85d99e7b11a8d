"""The numbers, why some cannot be had, and what to know of them."""

from ditfast.evaluation import EvaluationError
from ditfast.evaluation.metrics import frechet_distance, inception_score, precision_recall

METRICS = {"fid": "FID", "sfid": "sFID", "is": "IS", "precision": "precision", "recall": "recall"}
NEIGHBOUR, PART, PUBLISHED = (
    3,
    5000,
    50_000,
)  # k of precision and recall, images of a part of the IS, of published FIDs


def unavailable_metrics(count: int, outputs, extractor, reference, pictures: int) -> dict[str, str]:
    """For each metric that cannot be had, why: known before the work.

    Args:
        count: samples.
        outputs: of the extractor for some images.
        reference: the Summary of statistics, None where the reference is images or there is none.
        pictures: images that the reference has.
    """
    found = {}
    if reference is None and not pictures:
        found = dict.fromkeys(("fid", "sfid", "precision", "recall"), "there is no --reference")
    elif "spatial" not in outputs:
        found["sfid"] = extractor.why_not("spatial")
    elif reference is not None and reference.spatial is None:
        found["sfid"] = "the reference has no mu_s, sigma_s"
    if "probabilities" not in outputs:
        found["is"] = extractor.why_not("probabilities")
    if reference is not None and not pictures:
        found |= dict.fromkeys(("precision", "recall"), "the reference has no arr_0, its images")
    for name, number in (("samples", count), ("images of the reference", pictures)):
        if 0 < number <= NEIGHBOUR:
            found |= dict.fromkeys(("precision", "recall"), f"more than {NEIGHBOUR} {name} are needed, got {number}")
    return found


def check_dimensions(outputs, reference, where: str) -> None:
    """Refuse statistics of features of another length."""
    for name, gaussian in (("features", reference.gaussian), ("spatial", reference.spatial)):
        if gaussian and name in outputs and len(gaussian[0]) != outputs[name].shape[1]:
            found = outputs[name].shape[1]
            raise EvaluationError(
                f"{where} holds statistics of {len(gaussian[0])} {name} dimensions, the extractor returns {found}"
            )


def compute_metrics(metrics, samples, reference, device) -> dict[str, float]:
    """The metrics by name, and the std of IS over its parts, unless there is one; summaries in, which hold what these
    metrics need.

    Raises:
        EvaluationError: stored statistics are no covariance, or probabilities do not sum to 1.
    """
    values = {}
    try:
        for name, part in (("fid", "gaussian"), ("sfid", "spatial")):
            if name in metrics:
                values[name] = frechet_distance(*getattr(samples, part), *getattr(reference, part))
        if "is" in metrics:
            values["is"], spread = inception_score(samples.probabilities, PART)
            values |= {"is_std": spread} if samples.count > PART else {}
        if metrics & {"precision", "recall"}:
            both = precision_recall(reference.features.to(device), samples.features.to(device), NEIGHBOUR)
            values |= dict(zip(("precision", "recall"), both, strict=True))
    except ValueError as error:
        raise EvaluationError(f"{', '.join(sorted(metrics - values.keys()))}: {error}") from error
    return {name: value for name, value in values.items() if name in metrics or name == "is_std"}


def notes(metrics, samples, reference, sizes) -> list[str]:
    """What makes these numbers differ from published ones."""
    found = []
    counts = [side.count for side in (samples, reference) if side is not None and side.count is not None]
    for name, part in (("fid", "gaussian"), ("sfid", "spatial")):
        if name in metrics and min(counts) <= len(getattr(samples, part)[0]):
            found.append(
                f"{METRICS[name]} is biased upwards: {min(counts)} images in {len(getattr(samples, part)[0])} "
                "dimensions have a singular covariance"
            )
    if metrics.keys() & {"fid", "sfid"} and samples.count < PUBLISHED:
        found.append(f"FID and sFID fall with the number of samples: published ones are of {PUBLISHED}")
    if "is" in metrics and samples.count % PART:
        found.append(f"IS is lower of few images: its parts have {PART}, the last one {samples.count % PART}")
    if len(set(sizes)) > 1:
        found.append("the samples are {1} x {0}, the reference {3} x {2}".format(*sizes[0], *sizes[1]))
    return found


def make_report(o, extractor, values, missing, samples, reference, sizes) -> dict:
    """All of it, as JSON holds it."""
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


def format_report(report: dict) -> str:
    """The report for people."""
    values, rows = report["metrics"], []
    for name, title in METRICS.items():
        if name in values:
            spread = f" ± {values['is_std']:.4f}" if name == "is" and "is_std" in values else ""
            rows.append(f"{title:<10}{values[name]:>10.4f}{spread}")
    rows += [f"{METRICS[name]:<10}{'–':>10}  {why}" for name, why in report["missing"].items()]
    samples, reference, features = report["samples"], report["reference"], report["features"]
    rows.append(f"samples: {samples['count']} images of {samples['path']}")
    if reference:
        count = reference["count"] or "statistics of an unstated number of"
        seen = f", of which {reference['pictures']} for precision and recall" if reference["pictures"] else ""
        rows.append(f"reference: {count} images of {reference['path']}{seen}")
    names = dict.fromkeys((features["name"], features["identity"]))  # of a function they are one
    rows.append(f"features: {', '.join(names)}, {features['dimensions']} dimensions")
    return "\n".join(rows + [f"note: {note}" for note in report["notes"]])
