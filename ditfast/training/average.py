"""Decay schedule of the weights' moving average."""

from math import ceil, log, prod
from typing import Literal

from ditfast.counted import counted

YOUNG = 0.01  # largest share of initial weights in an average worth sampling from


def wants_warmup(choice: Literal["auto", "on", "off"], decay: float, steps: int) -> bool:
    """Whether the average of a run of ``steps`` steps warms up; "auto": only in runs too short for the full decay."""
    return choice == "on" or (choice == "auto" and steps < 5 / (1 - decay))


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay at one step; the first is step 0.

    Source: ExponentialMovingAverage with num_updates in Abadi et al., "TensorFlow: Large-Scale Machine Learning";
    with it the initial weights vanish after a few steps.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def initial_share(steps: int, decay: float, warmup: bool) -> float:
    """Share of the initial weights in the average after ``steps`` steps, in [0, 1]."""
    warming = min(steps, 100) if warmup else 0  # by then practically nothing is left
    return prod(decay_at(t, decay, warmup) for t in range(warming)) * decay ** (steps - warming)


def youth(steps: int, decay: float, warmup: bool) -> str | None:
    """Why the average after ``steps`` steps is not worth sampling from; None if it is."""
    share = initial_share(steps, decay, warmup)
    if share < YOUNG:
        return None
    after = f"after {counted(steps, 'step')} at --ema {decay:g}"
    return f"{after} the average of the weights is {share:.0%} initial weights"


def matures_at(decay: float) -> int:
    """Steps after which an average without warm-up is worth sampling from."""
    return ceil(log(YOUNG) / log(decay)) if decay else 1
