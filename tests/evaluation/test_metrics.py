"""Metrics compared with other packages, other formulas, and cases with known answers."""

import itertools
import math

import numpy as np
import pytest
import torch

from ditfast.evaluation import metrics
from ditfast.evaluation.metrics import Moments, frechet_distance, inception_score, moments, precision_recall


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def correlated(rng, n, d, shift=0.0):
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift


def test_moments_equal_numpys(rng):
    x = correlated(rng, 57, 9, shift=3)
    mean, cov = moments(x)
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(x, rowvar=False), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("sizes", [(1, 1, 55), (57,), (20, 30, 7)])
def test_batches_give_the_moments_of_all(rng, sizes):
    x, sums = correlated(rng, 57, 9), Moments()
    for part in np.split(x, np.cumsum(sizes)[:-1]):
        sums.add(part)
    for ours, theirs in zip(sums.result(), (x.mean(0), np.cov(x, rowvar=False)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12)


def test_moments_in_blocks_equal_those_of_all(rng, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", 1)  # blocks of 8
    x = correlated(rng, 43, 5)
    np.testing.assert_allclose(moments(x)[1], np.cov(x, rowvar=False), rtol=1e-11, atol=1e-12)


def test_a_mean_far_from_zero_costs_no_digits(rng):
    x = rng.normal(size=(300, 4))
    far, sums = x + 2.0**24, Moments()  # mean of squares minus square of the mean would lose 14 of 16 digits
    for part in np.array_split(far, 13):
        sums.add(part)
    np.testing.assert_allclose(sums.result()[1], np.cov(x, rowvar=False), rtol=1e-7, atol=1e-8)


def test_float32_features_are_summed_in_float64(rng):
    x = rng.normal(100, 1, size=(9000, 2)).astype(np.float32)
    np.testing.assert_allclose(moments(torch.from_numpy(x))[0], x.astype(np.float64).mean(0), rtol=1e-13)


@pytest.mark.parametrize("n, d", [(200, 12), (40, 12)])
def test_frechet_distance_equals_scipys_and_torchmetrics(rng, n, d):
    linalg = pytest.importorskip("scipy.linalg")
    fid = pytest.importorskip("torchmetrics.image.fid")
    a, b = moments(correlated(rng, n, d)), moments(correlated(rng, n + 5, d, shift=0.5))
    ours = frechet_distance(*a, *b)
    root = linalg.sqrtm(a[1].numpy() @ b[1].numpy()).real
    theirs = ((a[0] - b[0]) ** 2).sum() + a[1].trace() + b[1].trace() - 2 * np.trace(root)
    assert ours == pytest.approx(float(theirs), rel=1e-6)
    assert ours == pytest.approx(float(fid._compute_fid(*a, *b)), rel=1e-6)


@pytest.mark.parametrize("n, m", [(5, 7), (5, 90), (2, 2)])
def test_fewer_samples_than_dimensions(rng, n, m):
    """The trace of the root, from the samples themselves: the nuclear norm of X Y^T / sqrt((n - 1)(m - 1))."""
    x, y = correlated(rng, n, 40), correlated(rng, m, 40, shift=1)
    dx, dy = x - x.mean(0), y - y.mean(0)
    cross = np.linalg.norm(dx @ dy.T, "nuc") / math.sqrt((n - 1) * (m - 1))
    spread = (dx**2).sum() / (n - 1) + (dy**2).sum() / (m - 1)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + spread - 2 * cross
    assert frechet_distance(*moments(x), *moments(y)) == pytest.approx(expected, rel=1e-10)


def test_singular_covariances_that_commute(rng):
    """Both have zero eigenvalues, in different directions: the distance is the sum of (sqrt(a) - sqrt(b))^2."""
    q = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = np.array([4, 9, 0, 0, 1, 2.0]), np.array([1, 0, 5, 0, 1, 8.0])
    zero = np.zeros(6)
    ours = frechet_distance(zero, q @ np.diag(a) @ q.T, zero, q @ np.diag(b) @ q.T)
    assert ours == pytest.approx(((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), rel=1e-12)


def test_distance_of_known_gaussians():
    eye = np.eye(3)
    assert frechet_distance(np.zeros(3), eye, np.array([1.0, 2, 2]), eye) == pytest.approx(9)
    assert frechet_distance(np.zeros(3), eye, np.zeros(3), 0 * eye) == pytest.approx(3)
    assert frechet_distance([0.0], [[4.0]], [0.0], [[9.0]]) == pytest.approx(1)


@pytest.mark.parametrize("n", [6, 100])
def test_distance_to_itself_is_zero_and_order_does_not_matter(rng, n):
    a, b = moments(correlated(rng, n, 20)), moments(correlated(rng, n, 20))
    assert 0 <= frechet_distance(*a, *a) < 1e-9 * float(a[1].trace())
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-9)


@pytest.mark.parametrize("part", [1, 14, 54, 55, 56])
def test_inception_score_equals_a_loops(rng, part):
    """Equal parts, and a last one with the remainder, which counts as much."""
    p = rng.dirichlet(np.full(6, 0.3), size=55)
    p[0] = np.eye(6)[2]  # 0 log 0
    scores = []
    for start in range(0, 55, part):
        rows = p[start : start + part]
        mean = [sum(row[j] for row in rows) / len(rows) for j in range(6)]
        divergence = [sum(v * math.log(v / mean[j]) for j, v in enumerate(row) if v > 0) for row in rows]
        scores.append(math.exp(sum(divergence) / len(rows)))
    assert inception_score(p, part) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12, abs=1e-12)


def test_inception_score_has_parts_of_5000(rng):
    """Like ADM's evaluator: a fixed ten parts would score far lower for 10,000 images of 1008 classes."""
    p = rng.dirichlet(np.full(40, 0.02), size=10_001)
    scores = [inception_score(each, len(each))[0] for each in (p[:5000], p[5000:10_000], p[10_000:])]
    assert scores[2] == pytest.approx(1)  # one image
    assert inception_score(p)[0] == pytest.approx(np.mean(scores), rel=1e-12)
    assert inception_score(p[:10_000]) == pytest.approx((np.mean(scores[:2]), np.std(scores[:2])), rel=1e-12)


def test_inception_score_equals_torchmetrics(rng):
    p = rng.dirichlet(np.full(6, 0.3), size=54)
    inception = pytest.importorskip("torchmetrics.image.inception")
    features = torch.nn.Identity()
    features.num_features = 6
    theirs = inception.InceptionScore(feature=features, splits=1)
    theirs.inception.forward = lambda images: torch.from_numpy(p).log()  # logits
    theirs.update(torch.zeros(54, 3, 4, 4, dtype=torch.uint8))
    assert inception_score(p)[0] == pytest.approx(float(theirs.compute()[0]), rel=1e-6)


def test_inception_score_of_known_sets():
    assert inception_score(np.eye(5)[np.arange(50) % 5], 5) == pytest.approx((5, 0))
    assert inception_score(np.full((20, 5), 0.2), 7) == pytest.approx((1, 0))
    assert inception_score(np.eye(5)[:4], 1) == pytest.approx((1, 0))  # one sample per part


def brute_force(real, fake, k):
    """The definition, literally: a loop over pairs of samples."""

    def inside(x, manifold):
        for i, center in enumerate(manifold):
            others = sorted(math.dist(center, other) for j, other in enumerate(manifold) if j != i)
            if math.dist(x, center) <= others[k - 1]:
                return True
        return False

    return sum(inside(x, real) for x in fake) / len(fake), sum(inside(x, fake) for x in real) / len(real)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_match_the_definition(rng, k):
    real, fake = rng.normal(size=(31, 4)), rng.normal(0.8, 0.5, size=(23, 4))
    ours = precision_recall(real, fake, k)
    assert ours == pytest.approx(brute_force(real, fake, k))
    assert ours[0] != ours[1] and min(ours) > 0 and max(ours) < 1  # a case that distinguishes the two


@pytest.mark.parametrize("block", [1, 7, 31, 1000])
def test_blocks_do_not_matter(rng, monkeypatch, block):
    real, fake = rng.normal(size=(31, 4)), rng.normal(0.8, 0.5, size=(23, 4))
    expected = brute_force(real, fake, 3)
    monkeypatch.setattr(metrics, "BLOCK", block)
    assert precision_recall(torch.from_numpy(real), torch.from_numpy(fake)) == pytest.approx(expected)


def test_precision_and_recall_far_from_zero(rng):
    real, fake = rng.normal(size=(31, 4)), rng.normal(0.8, 0.5, size=(23, 4))
    assert precision_recall(real + 2.0**27, fake + 2.0**27) == pytest.approx(brute_force(real, fake, 3))


def test_balls_of_equal_samples_contain_only_their_equals(rng):
    """Their radius is zero; rounding, which depends on the sets' shapes, must not empty them."""
    one, other = rng.normal(size=(3, 67)), rng.normal(0.8, 0.5, size=(23, 67))
    same, mixed = np.repeat(one, 8, axis=0), np.concatenate([other, one])
    assert precision_recall(same, mixed) == pytest.approx((3 / 26, 1))
    assert precision_recall(mixed, same) == pytest.approx((1, 3 / 26))


def test_arrays_and_tensors_agree(rng):
    x, y = correlated(rng, 30, 5), correlated(rng, 30, 5)
    for pair in itertools.product((x, torch.from_numpy(x)), (y, torch.from_numpy(y))):
        assert precision_recall(*pair) == precision_recall(x, y)
        assert frechet_distance(*moments(pair[0]), *moments(pair[1])) == frechet_distance(*moments(x), *moments(y))


def one_nan(n, d):
    x = np.zeros((n, d))
    x[1, 0] = np.nan
    return x


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: moments(np.zeros((1, 4))), r"features must have shape \(N, D\) with N >= 2, D >= 1, got \(1, 4\)"),
        (lambda: moments(np.zeros(4)), r"features must have shape .* got \(4,\)"),
        (lambda: moments(one_nan(3, 4)), "features must be finite, got 1 of 12 values"),
        (lambda: moments(["a"]), "features must be an array or a tensor of numbers, got list"),
        (lambda: moments(np.zeros((3, 2), complex)), "features must be real, got torch.complex128"),
        (lambda: precision_recall(np.zeros((9, 4)), np.zeros((9, 5))), "fake must have D = 4, like real, got 5"),
        (lambda: precision_recall(np.zeros((9, 4)), np.zeros((3, 4))), "k must be between 1 and 2, .* fake, got 3"),
        (lambda: precision_recall(np.zeros((9, 4)), np.zeros((9, 4)), k=0), "k must be between 1 and 8, .* got 0"),
        (lambda: precision_recall(one_nan(9, 4), np.zeros((9, 4))), "real must be finite, got 1 of 36"),
        (lambda: inception_score(np.full((4, 2), 0.5), 0), "part must be at least 1, got 0"),
        (
            lambda: inception_score(np.full((4, 2), 0.6), 2),
            "probabilities must be >= 0 and sum to 1, got .* off by 0.2",
        ),
        (lambda: inception_score(np.array([[1.5, -0.5]]), 1), "probabilities must be >= 0 .* minimum of -0.5"),
        (
            lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)),
            "mean2 must have D = 2, like mean1",
        ),
        (
            lambda: frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)),
            r"mean1 and cov1 must have shapes",
        ),
        (lambda: frechet_distance([np.inf, 0], np.eye(2), np.zeros(2), np.eye(2)), "mean1 must be finite"),
        (lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), [[1.0, 1], [0, 1]]), "cov2 must be symmetric"),
        (lambda: frechet_distance(np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2)), "cov1 must be a covariance"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_batches_of_another_dimension_and_too_few():
    sums = Moments()
    sums.add(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        sums.result()
    with pytest.raises(ValueError, match="features must have D = 3, like earlier batches, got 2"):
        sums.add(np.zeros((1, 2)))
