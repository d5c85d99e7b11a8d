"""How fast the average of the weights follows them."""

from math import prod

YOUNG = 0.01  # part of the initial weights from which on an average is not to be sampled from


def wants_warmup(choice: str, decay: float, steps: int) -> bool:
    """Whether a run of so many steps warms its average up; "auto" where it would end before the average is one."""
    return choice == "on" or (choice == "auto" and steps < 5 / (1 - decay))


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay of one step; step 0 is the first.

    Source: Abadi et al., "TensorFlow: Large-Scale Machine Learning", whose ExponentialMovingAverage takes num_updates
    so; with it the initial weights are gone after a few steps.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


def initial_share(steps: int, decay: float, warmup: bool) -> float:
    """How much of the average after so many steps is the initial weights, in [0, 1]."""
    warming = min(steps, 100) if warmup else 0  # then as good as nothing is left
    return prod(decay_at(t, decay, warmup) for t in range(warming)) * decay ** (steps - warming)


def youth(steps: int, decay: float, warmup: bool) -> str | None:
    """Why not to sample from the average after so many steps; None if it is old enough."""
    share = initial_share(steps, decay, warmup)
    if share < YOUNG:
        return None
    return f"after {steps:,} steps at --ema {decay:g} the average of the weights is {share:.0%} initial weights"
