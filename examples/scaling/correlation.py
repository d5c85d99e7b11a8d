"""Spearman's rank correlation, with a confidence interval."""

import numpy as np

DRAWS = 10_000


def spearman(x, y):
    """Rank correlation along the last axis. Ties get their mean rank; constants give nan."""
    a, b = (r - r.mean(-1, keepdims=True) for r in (ranks(x), ranks(y)))
    with np.errstate(invalid="ignore"):
        found = (a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    return float(found) if found.ndim == 0 else found


def ranks(values) -> np.ndarray:
    """Ranks along the last axis, 1 for the smallest; ties get their mean rank."""
    values = np.asarray(values, dtype=float)
    row, column = values[..., None, :], values[..., :, None]
    return (row < column).sum(-1) + ((row == column).sum(-1) + 1) / 2


def interval(x, groups, models: bool, seed: int = 0) -> tuple[float, float]:
    """The central 95% of Spearman's correlation of x with the groups' means, over `DRAWS` bootstrap samples.

    Args:
        x: (M,) one value per model.
        groups: M sequences, a model's results over its seeds, which are drawn with replacement.
        models: draw the models too, with replacement.
    """
    x, random = np.asarray(x, dtype=float), np.random.default_rng(seed)
    means = [np.asarray(g)[random.integers(len(g), size=(DRAWS, len(g)))].mean(1) for g in groups]
    means = np.stack(means, axis=1)  # (DRAWS, M)
    chosen = random.integers(len(x), size=means.shape) if models else np.tile(np.arange(len(x)), (DRAWS, 1))
    found = spearman(x[chosen], np.take_along_axis(means, chosen, 1))
    low, high = np.nanquantile(found, (0.025, 0.975))  # nan: one model M times
    return float(low), float(high)
