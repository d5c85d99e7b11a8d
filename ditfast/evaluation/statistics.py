"""What is known of a set of images: from its pictures, or from an npz of statistics.

The npz has the keys of ADM's reference files: mu (D,), sigma (D, D) of features, mu_s, sigma_s of spatial features,
arr_0 some of the images, for precision and recall. Two more, which others ignore, tell what they were made of:
count, and extractor.
"""

import math
import zipfile
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np
import torch

from ditfast.atomic import atomic_write
from ditfast.evaluation import EvaluationError
from ditfast.evaluation.features import Extractor
from ditfast.evaluation.images import evenly_spaced, npz_errors, read_batches, read_header
from ditfast.evaluation.metrics import Moments
from ditfast.optional import import_optional

KEYS = ("mu", "sigma", "mu_s", "sigma_s", "count", "extractor")
LARGEST = 1 << 30  # bytes of an array: sigma of 11,585 dimensions
KEPT = 10_000  # images of a reference for precision and recall, as many as ADM's reference files hold


class Summary(NamedTuple):
    """Of one set. None: not known."""

    count: int | None  # images behind the Gaussians
    gaussian: tuple | None = None  # (mean (D,), covariance (D, D)) of features
    spatial: tuple | None = None  # of spatial features
    features: torch.Tensor | None = None  # (n, D), those kept for precision and recall
    probabilities: torch.Tensor | None = None  # (N, K)


def summarize(images, numbers, extractor: Extractor, batch: int, label: str, keep=(), judge=False) -> Summary:
    """One pass over the images with these numbers, of which at least two.

    Args:
        keep: the numbers whose features are kept, on the CPU.
        judge: keep the probabilities of all.
    """
    sums, spatial_sums = Moments(), Moments()
    kept, probabilities, keep, numbers = [], [], set(keep), list(numbers)
    with import_optional("tqdm").tqdm(total=len(numbers), unit="image", desc=label) as bar:
        for start, pictures in zip(range(0, len(numbers), batch), read_batches(images, numbers, batch), strict=True):
            now = numbers[start : start + batch]
            try:
                outputs = extractor(pictures)
                sums.add(outputs["features"])
                if "spatial" in outputs:
                    spatial_sums.add(outputs["spatial"])
            except (EvaluationError, ValueError) as error:
                raise EvaluationError(f"{label} {now[0]} to {now[-1]}: {error}") from error
            kept.append(outputs["features"].cpu()[[number in keep for number in now]])
            if judge:
                probabilities.append(outputs["probabilities"].cpu())
            bar.update(len(pictures))
    return Summary(
        len(numbers),
        _on_cpu(sums),
        _on_cpu(spatial_sums) if spatial_sums.count else None,
        torch.cat(kept) if keep else None,
        torch.cat(probabilities) if judge else None,
    )


def _on_cpu(sums: Moments):
    return tuple(value.cpu() for value in sums.result())  # where stored ones are


def load_statistics(option: str, path, extractor: Extractor) -> Summary:
    """The Gaussians of an npz, if its features are those of ``extractor`` as far as it says."""
    with npz_errors(f"{option} {path}"), zipfile.ZipFile(path) as archive:
        keys = [key for key in KEYS if f"{key}.npy" in archive.namelist()]
        found = {key: _read_array(f"{option} {path}", archive, key) for key in keys}
    made_of = str(found.get("extractor", extractor.identity))
    if made_of != extractor.identity:
        raise EvaluationError(
            f"{option} {path} holds statistics of other features, {made_of}, not of {extractor.identity}"
        )
    gaussian = _gaussian(f"{option} {path}", found, "mu", "sigma")
    spatial = _gaussian(f"{option} {path}", found, "mu_s", "sigma_s") if "mu_s" in found else None
    count = found.get("count")
    if count is not None and (count.shape or count.dtype.kind not in "iu" or count < 2):
        raise EvaluationError(
            f"{option} {path}: count must be a whole number of at least 2, got {short(count.tolist())}"
        )
    return Summary(None if count is None else int(count), gaussian, spatial)


def _read_array(where, archive, key):
    """An array of an npz, of which the header is believed only if it is small."""
    (shape, _, dtype), _ = read_header(archive, key)
    if math.prod(shape) * dtype.itemsize > LARGEST:
        raise EvaluationError(f"{where}: {key} must have at most {LARGEST} bytes, got {dtype} {shape}")
    with archive.open(f"{key}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _gaussian(where, found, mean, cov):
    if cov not in found:
        raise EvaluationError(f"{where} holds {mean} and no {cov}")
    d = found[mean].shape[0] if found[mean].ndim == 1 else None
    if d is None or found[cov].shape != (d, d):
        raise EvaluationError(
            f"{where}: {mean} and {cov} must be (D,) and (D, D), got {found[mean].shape} and {found[cov].shape}"
        )
    for name in (mean, cov):
        if found[name].dtype.kind not in "fiu" or not np.isfinite(found[name]).all():
            raise EvaluationError(f"{where}: {name} must hold finite numbers, got {_describe(found[name])}")
    return tuple(torch.from_numpy(found[name].astype(np.float64)) for name in (mean, cov))


def _describe(array):
    return f"{array.dtype} with {np.isnan(array).sum()} NaN" if array.dtype.kind == "f" else str(array.dtype)


def check_new_file(option: str, path) -> None:
    """Refuse a file that exists, or has no folder to be in, before any work is done for it."""
    if path is None:
        return
    if Path(path).exists():
        raise EvaluationError(f"{option} {path} exists: choose another name")
    if not Path(path).absolute().parent.is_dir():
        raise EvaluationError(f"{option} must be in a folder that exists, got {path}")


def save_statistics(option: str, path, summary: Summary, extractor: Extractor, images) -> None:
    """The npz described above, with at most `KEPT` of the images, one of which is in memory at a time."""
    arrays = {"mu": summary.gaussian[0], "sigma": summary.gaussian[1]}
    if summary.spatial:
        arrays |= {"mu_s": summary.spatial[0], "sigma_s": summary.spatial[1]}
    arrays = {key: value.numpy() for key, value in arrays.items()}
    arrays |= {"count": np.array(summary.count), "extractor": np.array(extractor.identity)}
    numbers = evenly_spaced(summary.count, KEPT)
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(numbers), *images.size, 3)}
    try:
        with atomic_write(Path(path)) as part, zipfile.ZipFile(part, "w") as archive:
            for key, value in arrays.items():
                with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, value, allow_pickle=False)
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for image in images.read(numbers):
                    member.write(image.tobytes())
    except OSError as error:
        raise EvaluationError(f"{option} {path} cannot be written: {error}") from error
