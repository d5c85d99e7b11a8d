"""Statistics of a set of images, computed from the images or read from an npz.

The npz has the keys of ADM's reference files: mu (D,) and sigma (D, D) of features, mu_s and sigma_s of spatial
features, and arr_0, some of the images, for precision and recall. Two more keys, which other tools ignore, record
their origin: count and extractor.
"""

import math
import zipfile
from collections.abc import Iterable
from pathlib import Path
from reprlib import repr as short
from typing import NamedTuple

import numpy as np
import torch

from ditfast.atomic import atomic_write
from ditfast.evaluation import EvaluationError
from ditfast.evaluation.features import Extractor
from ditfast.evaluation.images import ImageFolder, ImageNpz, evenly_spaced, npz_errors, read_batches, read_header
from ditfast.evaluation.metrics import Moments
from ditfast.progress import progress

KEYS = ("mu", "sigma", "mu_s", "sigma_s", "count", "extractor")
LARGEST = 1 << 30  # bytes per array: sigma with 11,585 dimensions
KEPT = 10_000  # reference images for precision and recall, as in ADM's reference files


class Summary(NamedTuple):
    """Statistics of one set of images; None: unknown."""

    count: int | None  # type: ignore[assignment]  # images behind the Gaussians; hides tuple.count
    gaussian: tuple[torch.Tensor, torch.Tensor] | None = None  # (mean (D,), covariance (D, D)) of features
    spatial: tuple[torch.Tensor, torch.Tensor] | None = None  # of spatial features
    features: torch.Tensor | None = None  # (n, D), for precision and recall
    probabilities: torch.Tensor | None = None  # (N, K)


def summarize(
    images: ImageFolder | ImageNpz,
    numbers: Iterable[int],
    extractor: Extractor,
    batch: int,
    label: str,
    keep: Iterable[int] = (),
    judge: bool = False,
) -> Summary:
    """Summarize at least two images in one pass.

    Args:
        numbers: which images.
        batch: images per call of the extractor.
        label: of the progress bar and errors.
        keep: the numbers whose features to keep, on the CPU.
        judge: also keep all probabilities.
    """
    sums, spatial_sums = Moments(), Moments()
    kept, probabilities, wanted, chosen = [], [], set(keep), list(numbers)
    with progress(len(chosen), "image", label) as bar:
        for start, pictures in zip(range(0, len(chosen), batch), read_batches(images, chosen, batch), strict=True):
            now = chosen[start : start + batch]
            try:
                outputs = extractor(pictures)
                sums.add(outputs["features"])
                if "spatial" in outputs:
                    spatial_sums.add(outputs["spatial"])
            except (EvaluationError, ValueError) as error:
                raise EvaluationError(f"{label} {now[0]} to {now[-1]}: {error}") from error
            kept.append(outputs["features"].cpu()[[number in wanted for number in now]])
            if judge:
                probabilities.append(outputs["probabilities"].cpu())
            bar.update(len(pictures))
    return Summary(
        len(chosen),
        _on_cpu(sums),
        _on_cpu(spatial_sums) if spatial_sums.count else None,
        torch.cat(kept) if wanted else None,
        torch.cat(probabilities) if judge else None,
    )


def _on_cpu(sums: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    mean, cov = sums.result()
    return mean.cpu(), cov.cpu()  # like stored ones


def load_statistics(option: str, path: str | Path, extractor: Extractor) -> Summary:
    """The Gaussians stored in an npz.

    Raises:
        EvaluationError: the file is damaged or invalid, or records another extractor.
    """
    with npz_errors(f"{option} {path}"), zipfile.ZipFile(path) as archive:
        keys = [key for key in KEYS if f"{key}.npy" in archive.namelist()]
        found = {key: _read_array(f"{option} {path}", archive, key) for key in keys}
    made_of = str(found.get("extractor", extractor.identity))
    if made_of != extractor.identity:
        raise EvaluationError(
            f"{option} {path} has statistics of other features, {made_of}, not {extractor.identity}"
        )
    gaussian = _gaussian(f"{option} {path}", found, "mu", "sigma")
    spatial = _gaussian(f"{option} {path}", found, "mu_s", "sigma_s") if "mu_s" in found else None
    count = found.get("count")
    if count is not None and (count.shape or count.dtype.kind not in "iu" or count < 2):
        raise EvaluationError(f"{option} {path}: count must be an integer of at least 2, got {short(count.tolist())}")
    return Summary(None if count is None else int(count), gaussian, spatial)


def _read_array(where, archive, key):
    """Read an array of an npz, unless its header claims too large a size."""
    (shape, _, dtype), _ = read_header(archive, key)
    if math.prod(shape) * dtype.itemsize > LARGEST:
        raise EvaluationError(f"{where}: {key} must have at most {LARGEST} bytes, got {dtype} {shape}")
    with archive.open(f"{key}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _gaussian(where, found, mean, cov):
    if cov not in found:
        raise EvaluationError(f"{where} has {mean} but no {cov}")
    d = found[mean].shape[0] if found[mean].ndim == 1 else None
    if d is None or found[cov].shape != (d, d):
        raise EvaluationError(
            f"{where}: {mean} and {cov} must be (D,) and (D, D), got {found[mean].shape} and {found[cov].shape}"
        )
    for name in (mean, cov):
        if found[name].dtype.kind not in "fiu" or not np.isfinite(found[name]).all():
            raise EvaluationError(f"{where}: {name} must be finite numbers, got {_describe(found[name])}")
    return torch.from_numpy(found[mean].astype(np.float64)), torch.from_numpy(found[cov].astype(np.float64))


def _describe(array):
    return f"{array.dtype} with {np.isnan(array).sum()} NaN" if array.dtype.kind == "f" else str(array.dtype)


def check_new_file(option: str, path: str | Path | None) -> None:
    """Reject an output file that exists or whose folder does not, before any work is done.

    Raises:
        EvaluationError: naming the option.
    """
    if path is None:
        return
    if Path(path).exists():
        raise EvaluationError(f"{option} {path} exists: choose another name")
    if not Path(path).absolute().parent.is_dir():
        raise EvaluationError(f"{option} must be in an existing folder, got {path}")


def save_statistics(
    option: str, path: str | Path, summary: Summary, extractor: Extractor, images: ImageFolder | ImageNpz
) -> None:
    """Write the npz described above with at most `KEPT` of the images, held in memory one at a time.

    Raises:
        EvaluationError: the file cannot be written.
    """
    assert summary.gaussian is not None and summary.count is not None  # made by `summarize`
    tensors = {"mu": summary.gaussian[0], "sigma": summary.gaussian[1]}
    if summary.spatial:
        tensors |= {"mu_s": summary.spatial[0], "sigma_s": summary.spatial[1]}
    arrays = {key: value.numpy() for key, value in tensors.items()}
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
