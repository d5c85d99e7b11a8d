"""FID, sFID, Inception Score, precision and recall, from features. Arrays or tensors in, float64 throughout.

sFID (Nash et al. 2021, arXiv 2103.03841) is `frechet_distance` of spatial features: it has no function of its own.

Raises, everywhere: ValueError, which names the argument, the rule and the value.
"""

from numbers import Integral

import torch

BLOCK = 512  # rows of distances that are in memory at once


class Moments:
    """Mean and covariance of samples that arrive in batches; none of them is kept.

    Batches are merged as Chan, Golub & LeVeque (1979) do: deviations from the batch's own mean are summed, never
    squares of the values themselves, so a mean far from zero costs no digits.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, None, None

    def add(self, features) -> None:
        """A batch (B, D), of any B >= 1."""
        x = _matrix("features", features, rows=1)
        if self.count == 0:
            self.mean, self.scatter = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        if x.shape[1] != len(self.mean):
            raise ValueError(f"features must have the D = {len(self.mean)} of earlier batches, got {x.shape[1]}")
        mean, total = x.mean(0), self.count + len(x)
        step, x = mean - self.mean, x - mean
        self.scatter += x.T @ x + torch.outer(step, step) * (self.count * len(x) / total)
        self.mean += step * (len(x) / total)
        self.count = total

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean (D,), covariance (D, D), divided by N - 1 as numpy.cov does)."""
        if self.count < 2:
            raise ValueError(f"features must be of at least 2 samples, got {self.count}")
        return self.mean, self.scatter / (self.count - 1)


def moments(features) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean (D,), covariance (D, D)) in float64 of features (N, D), N >= 2."""
    features, sums = _matrix("features", features, dtype=None), Moments()
    for block in features.split(8 * BLOCK):  # the float64 copy is of a block
        sums.add(block)
    return sums.result()


def frechet_distance(mean1, cov1, mean2, cov2) -> float:
    """Squared Fréchet distance of two Gaussians (Dowson & Landau 1982; FID: Heusel et al. 2017, arXiv 1706.08500).

    |mean1 - mean2|^2 + tr(cov1) + tr(cov2) - 2 tr((cov1 cov2)^(1/2)), with mean (D,) and cov (D, D).

    The last trace is the sum of the singular values of R1^T R2, where cov = R R^T from symmetric eigenvalues. A
    covariance of fewer samples than dimensions is singular; what eigh returns for its zeros is rounding, about
    D eps of the largest. The usual root of the product turns each such zero into sqrt(eps), or into a complex number;
    here they are dropped, and nothing is added to the diagonal.

    Cost: two eigendecompositions and the singular values of D x D, on the device of cov1.
    """
    mean1, cov1 = _gaussian("mean1", mean1, "cov1", cov1)
    mean2, cov2 = _gaussian("mean2", mean2, "cov2", cov2)
    if len(mean1) != len(mean2):
        raise ValueError(f"mean2 must have the D = {len(mean1)} of mean1, got {len(mean2)}")
    mean2, cov2 = mean2.to(cov1.device), cov2.to(cov1.device)
    cross = torch.linalg.svdvals(_root("cov1", cov1).T @ _root("cov2", cov2)).sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(0.0, float(distance))  # of equal Gaussians it is zero, give or take rounding


def inception_score(probabilities, part: int = 5000) -> tuple[float, float]:
    """(mean, std) over consecutive parts of exp(E_x KL(p(y|x) || p(y))) (Salimans et al. 2016).

    The score of few images is low, so parts of one size are compared: the 5000 of ADM's evaluator are the 10 parts of
    50,000. The last part has what is left, and counts as much as the others, as there.

    Args:
        probabilities: (N, K), each row the class probabilities of an image, in an order that mixes the classes.
        part: images of a part; the std is that of the parts, without Bessel's correction, as in the original.
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
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def precision_recall(real, fake, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).

    A set's manifold is the union of balls around its samples, each as large as the distance to the sample's k-th
    nearest other sample. Precision is the part of ``fake`` (M, D) in the manifold of ``real`` (N, D), recall the
    part of ``real`` in that of ``fake``; both sets have more than k samples.

    Cost: (N^2 + M^2 + N M) D multiply-adds, 1.5e13 for twice 50,000 samples of D = 2048, on the device where ``real``
    is; memory: both sets in float64, and a few times `BLOCK` x max(N, M) distances.
    """
    real, fake = _matrix("real", real), _matrix("fake", fake)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"fake must have the D = {real.shape[1]} of real, got {fake.shape[1]}")
    _whole("k", k)
    for name, x in (("real", real), ("fake", fake)):
        if not 1 <= k < len(x):
            raise ValueError(f"k must be between 1 and {len(x) - 1}, one less than the samples of {name}, got {k}")
    center = real.mean(0)  # distances do not change, and lose fewer digits
    real, fake = real - center, fake.to(real.device) - center
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    precise, recalled = fake_radii.new_zeros(len(fake), dtype=torch.bool), []
    for rows, radii in zip(real.split(BLOCK), real_radii.split(BLOCK), strict=True):
        distances = _distances(rows, fake)  # (b, M)
        precise |= (distances <= radii[:, None]).any(0)
        recalled.append((distances <= fake_radii).any(1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def _radii(x, k):
    """Squared distance of each sample (N, D) to its k-th nearest other sample."""
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
    return distances.where(distances > 1e-13 * scale, 0.0)  # equal rows differ by rounding, which must not decide


def _root(name, cov):
    """R (D, r) with R R^T = cov, of the r eigenvalues that are more than rounding."""
    values, vectors = torch.linalg.eigh(cov)
    if values[0] < -1e-4 * values[-1].abs():  # float32 statistics stay above
        raise ValueError(f"{name} must be a covariance, got the eigenvalue {values[0]:.3g} beside {values[-1]:.3g}")
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
    """``value`` as a finite tensor (N, D) with N >= rows, D >= 1; dtype None leaves it as it is."""
    x = _tensor(name, value)
    if x.ndim != 2 or len(x) < rows or x.shape[1] < 1:
        raise ValueError(f"{name} must have shape (N, D) with N >= {rows}, D >= 1, got {tuple(x.shape)}")
    return _finite(name, x if dtype is None else x.to(dtype))


def _whole(name, value):
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}")


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
