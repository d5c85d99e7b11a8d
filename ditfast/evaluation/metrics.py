"""FID, sFID, Inception Score, precision and recall from features (arrays or tensors), computed in float64.

sFID (Nash et al. 2021, arXiv 2103.03841) is `frechet_distance` of spatial features.

All functions raise ValueError on invalid input, naming the argument, the rule and the value.
"""

from numbers import Integral

import numpy as np
import torch

Array = torch.Tensor | np.ndarray

BLOCK = 512  # rows of distances in memory at once


class Moments:
    """Mean and covariance of samples that arrive in batches, without storing the samples.

    Batches are merged as in Chan, Golub & LeVeque (1979): sums are over deviations from the batch mean, never over
    squared values, so a mean far from zero costs no precision.

    Attributes:
        count: number of samples.
        mean, scatter: (D,) and (D, D) float64; empty before the first batch.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.empty(0, device="cpu")

    def add(self, features: Array) -> None:
        """Add a batch of features (B, D), B >= 1."""
        x = _matrix("features", features, rows=1)
        if self.count == 0:
            self.mean, self.scatter = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        if x.shape[1] != len(self.mean):
            raise ValueError(f"features must have D = {len(self.mean)}, like earlier batches, got {x.shape[1]}")
        mean, total = x.mean(0), self.count + len(x)
        step, x = mean - self.mean, x - mean
        self.scatter += x.T @ x + torch.outer(step, step) * (self.count * len(x) / total)
        self.mean += step * (len(x) / total)
        self.count = total

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (mean (D,), covariance (D, D)), normalized by N - 1 like numpy.cov."""
        if self.count < 2:
            raise ValueError(f"features must have at least 2 samples, got {self.count}")
        return self.mean, self.scatter / (self.count - 1)


def moments(features: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean (D,), covariance (D, D)) in float64 of features (N, D), N >= 2."""
    sums = Moments()
    for block in _matrix("features", features, dtype=None).split(8 * BLOCK):  # convert to float64 by blocks
        sums.add(block)
    return sums.result()


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; FID: Heusel et al. 2017, arXiv 1706.08500).

    |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2)), with mean (D,) and cov (D, D).

    The last trace is the sum of the singular values of R1^T R2, with cov = R R^T from a symmetric eigendecomposition.
    A covariance of fewer samples than dimensions is singular; eigh returns its zero eigenvalues as rounding errors of
    about D eps times the largest. The usual square root of the product turns them into sqrt(eps) or complex numbers.
    Here they are dropped, and nothing is added to the diagonal.

    Cost: two eigendecompositions and one SVD (singular values only) of D x D, on cov1's device.
    """
    m1, c1 = _gaussian("mean1", mean1, "cov1", cov1)
    m2, c2 = _gaussian("mean2", mean2, "cov2", cov2)
    if len(m1) != len(m2):
        raise ValueError(f"mean2 must have D = {len(m1)}, like mean1, got {len(m2)}")
    m2, c2 = m2.to(c1.device), c2.to(c1.device)
    cross = torch.linalg.svdvals(_root("cov1", c1).T @ _root("cov2", c2)).sum()
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross
    return max(0.0, float(distance))  # rounding can make it negative for equal Gaussians


def inception_score(probabilities: Array, part: int = 5000) -> tuple[float, float]:
    """(mean, std) over consecutive parts of exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016).

    Few images score low, so the part size is fixed; 5000, as in ADM's evaluator, gives 10 parts for 50,000 images.
    The last part has the remaining images and the same weight as the others, as in that evaluator.

    Args:
        probabilities: (N, K), class probabilities of each image, with the classes in mixed order.
        part: images per part; the std over parts is without Bessel's correction, as in the original.
    """
    p = _matrix("probabilities", probabilities, rows=1)
    _whole("part", part)
    if part < 1:
        raise ValueError(f"part must be at least 1, got {part}")
    worst = (p.sum(1) - 1).abs().max()
    if p.min() < 0 or worst > 1e-3:
        raise ValueError(
            f"probabilities must be >= 0 and sum to 1, got a minimum of {p.min():.3g}, a sum off by {worst:.3g}"
        )
    scores = []
    for each in p.split(part):
        divergence = torch.special.xlogy(each, each) - torch.special.xlogy(each, each.mean(0))  # 0 log 0 is 0
        scores.append(divergence.sum(1).mean().exp())

    found = torch.stack(scores)
    return float(found.mean()), float(found.std(correction=0))


def precision_recall(real: Array, fake: Array, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

    A set's manifold is the union of balls around its samples, each with the distance to the sample's k-th nearest
    neighbor as radius. Precision is the share of ``fake`` (M, D) in the manifold of ``real`` (N, D), recall the share
    of ``real`` in that of ``fake``. Both sets must have more than k samples.

    Cost: (N^2 + M^2 + N M) D multiply-adds, 1.5e13 for twice 50,000 samples with D = 2048, on the device of ``real``.
    Memory: both sets in float64, and a few times `BLOCK` x max(N, M) distances.
    """
    a, b = _matrix("real", real), _matrix("fake", fake)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"fake must have D = {a.shape[1]}, like real, got {b.shape[1]}")
    _whole("k", k)
    for name, x in (("real", a), ("fake", b)):
        if not 1 <= k < len(x):
            raise ValueError(f"k must be between 1 and {len(x) - 1}, one less than the samples of {name}, got {k}")
    center = a.mean(0)  # preserves distances and improves their precision
    a, b = a - center, b.to(a.device) - center
    real_radii, fake_radii = _radii(a, k), _radii(b, k)
    precise, recalled = fake_radii.new_zeros(len(b), dtype=torch.bool), []
    for rows, radii in zip(a.split(BLOCK), real_radii.split(BLOCK), strict=True):
        distances = _distances(rows, b)  # (b, M)
        precise |= (distances <= radii[:, None]).any(0)
        recalled.append((distances <= fake_radii).any(1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def _radii(x, k):
    """Squared distance (N,) of each sample (N, D) to its k-th nearest neighbor."""
    radii = []
    for start in range(0, len(x), BLOCK):
        distances = _distances(x[start : start + BLOCK], x)
        rows = torch.arange(len(distances), device=x.device)
        distances[rows, start + rows] = torch.inf  # itself
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def _distances(a, b):
    """Squared distances (N, M) between the rows of float64 (N, D) and (M, D)."""
    scale = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = scale - 2 * (a @ b.T)
    return distances.where(distances > 1e-13 * scale, 0.0)  # rounding must not separate equal rows


def _root(name, cov):
    """R (D, r) with R R^T = cov, from the r eigenvalues above rounding error."""
    values, vectors = torch.linalg.eigh(cov)
    if values[0] < -1e-4 * values[-1].abs():  # float32 statistics stay above
        raise ValueError(f"{name} must be a covariance, got eigenvalues from {values[0]:.3g} to {values[-1]:.3g}")
    kept = values > len(cov) * torch.finfo(cov.dtype).eps * values[-1].abs()
    return vectors[:, kept] * values[kept].sqrt()


def _gaussian(mean_name, mean, cov_name, cov):
    cov = _matrix(cov_name, cov, rows=1)
    mean = _finite(mean_name, _tensor(mean_name, mean).to(torch.float64)).to(cov.device)
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        shapes = f"{tuple(mean.shape)}, {tuple(cov.shape)}"
        raise ValueError(f"{mean_name} and {cov_name} must have shapes (D,) and (D, D), got {shapes}")
    if not torch.allclose(cov, cov.T, rtol=1e-4, atol=1e-6 * float(cov.abs().max())):
        raise ValueError(f"{cov_name} must be symmetric, got entries that differ by {(cov - cov.T).abs().max():.3g}")
    return mean, cov


def _matrix(name, value, rows=2, dtype=torch.float64):
    """``value`` as a finite tensor (N, D) with N >= rows, D >= 1; dtype None keeps its dtype."""
    x = _tensor(name, value)
    if x.ndim != 2 or len(x) < rows or x.shape[1] < 1:
        raise ValueError(f"{name} must have shape (N, D) with N >= {rows}, D >= 1, got {tuple(x.shape)}")
    return _finite(name, x if dtype is None else x.to(dtype))


def _whole(name, value):
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")


def _tensor(name, value):
    try:
        x = value.detach() if torch.is_tensor(value) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be an array or a tensor of numbers, got {type(value).__name__}") from error
    if x.is_complex():
        raise ValueError(f"{name} must be real, got {x.dtype}")
    return x


def _finite(name, x):
    if not x.isfinite().all():
        bad = int((~x.isfinite()).sum())
        raise ValueError(f"{name} must be finite, got {bad} of {x.numel()} values that are not")
    return x
