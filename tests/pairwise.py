"""A small set of cases in which every pair of values from two axes occurs at least once."""

import itertools
import random


def pairwise(cost, **axes):
    """Greedy, deterministic all-pairs; ties go to the case with the lowest ``cost(case)``."""
    names = list(axes)
    uncovered = {
        ((a, u), (b, v))
        for a, b in itertools.combinations(names, 2)
        for u in map(str, axes[a])
        for v in map(str, axes[b])
    }
    every = [dict(zip(names, values, strict=True)) for values in itertools.product(*axes.values())]
    rng = random.Random(0)
    chosen = []
    while uncovered:
        best = max(rng.sample(every, min(1500, len(every))), key=lambda c: (len(_pairs(c) & uncovered), -cost(c)))
        if _pairs(best) & uncovered:
            uncovered -= _pairs(best)
            chosen.append(best)
    return chosen


def _pairs(case):
    return set(itertools.combinations([(k, str(v)) for k, v in case.items()], 2))
