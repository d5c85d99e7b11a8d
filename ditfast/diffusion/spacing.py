"""Processes with fewer timesteps: which ones to keep, and the variances of the steps, in float64 on the host."""

import math
from collections.abc import Iterable
from itertools import accumulate, repeat

import numpy as np


def space_timesteps(num_timesteps: int, section_counts: str | int | Iterable[int]) -> set[int]:
    """Choose the timesteps to keep out of ``num_timesteps``.

    Args:
        num_timesteps: T of the full process.
        section_counts: how many steps to keep in each of equal sections, as integers or as a string, ``"10,15,20"``.
            A section keeps both its ends, or its first step if it keeps one; a single step in all is the last, where
            sampling starts from noise. ``"ddimN"`` keeps N steps at an even stride from 0, an integer one if
            possible, as in the original.

    Raises:
        ValueError: any other specification, or more steps than exist.

    Source: Nichol & Dhariwal 2021, section 4; Song et al. 2021, appendix D.2 (linear, "ddimN").
    """
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _strided(num_timesteps, section_counts)
    counts = _parse(section_counts)
    if counts == [1]:
        return {num_timesteps - 1}
    size, larger = divmod(num_timesteps, len(counts))
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < larger)
        kept.update(start + step for step in _spread(length, count))
        start += length
    return kept


def _strided(num_timesteps, spec):
    count = int(spec[4:]) if spec[4:].isdecimal() and len(spec) < 20 else 0
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"timestep_respacing must be 'ddimN', N from 1 to {num_timesteps}, got {spec!r}")
    if count == 1:
        return {num_timesteps - 1}
    stride = math.ceil(num_timesteps / count)
    whole = range(0, num_timesteps, stride)
    return set(whole if len(whole) == count else (i * num_timesteps // count for i in range(count)))


def _parse(section_counts):
    counts = section_counts.split(",") if isinstance(section_counts, str) else section_counts
    counts = list(counts) if isinstance(counts, Iterable) else [counts]
    try:
        # via str, to reject 2.5 and True
        counts = [int(str(count)) for count in counts]
    except ValueError:
        counts = []
    if not counts or min(counts) < 0 or not any(counts):
        raise ValueError(
            "timestep_respacing must be counts, not all 0, such as 250, '250' or '10,15,20', or 'ddimN', "
            f"got {section_counts!r}"
        )
    return counts


def _spread(length, count):
    """``count`` of range(length), including both ends, as even as rounding allows."""
    if count > length:
        raise ValueError(f"timestep_respacing must keep at most the {length} steps of a section, got {count}")
    stride = (length - 1) / (count - 1) if count > 1 else 1
    # summed, not multiplied: rounding errors of the sum decide ties, as in the original
    positions = accumulate(repeat(stride, max(count - 1, 0)), initial=0.0)
    return [round(position) for position in positions][:count]


def respace(betas: np.ndarray, timesteps: list[int]) -> np.ndarray:
    """The variances of the process that only visits ``timesteps``: (T,) -> (len(timesteps),).

    Source: Nichol & Dhariwal 2021, equation 19.
    """
    alphas_cumprod = np.cumprod(1 - betas)[timesteps]
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
