"""Processes of fewer timesteps: which are kept, and the variances of their steps, in float64 on the host."""

import math
from collections.abc import Iterable
from itertools import accumulate, repeat

import numpy as np


def space_timesteps(num_timesteps: int, section_counts: str | int | Iterable[int]) -> set[int]:
    """The timesteps to keep of ``num_timesteps``.

    Args:
        num_timesteps: T of the full process.
        section_counts: how many to keep of each of as many equal sections, as integers or as text, ``"10,15,20"``;
            each section keeps both ends, and its first step where it keeps one. A single step is the last, since
            sampling starts there, from noise. ``"ddimN"`` keeps N at an even stride from 0: a whole one where there
            is one, as the original has it.

    Raises:
        ValueError: not such a specification, or more steps than there are.

    Source: Nichol & Dhariwal 2021, section 4; Song et al. 2021, appendix D.2 (linear, "ddimN").
    """
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        return _strided(num_timesteps, section_counts)
    counts = _parse(section_counts)
    if counts == [1]:
        return {num_timesteps - 1}
    size, larger = divmod(num_timesteps, len(counts))
    kept, start = set(), 0
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
        # through text, so that 2.5 and True are refused
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
    """``count`` of range(length), as even as rounding allows, both ends among them."""
    if count > length:
        raise ValueError(f"timestep_respacing must keep at most the {length} steps of a section, got {count}")
    stride = (length - 1) / (count - 1) if count > 1 else 1
    # summed, not multiplied: rounding errors of the sum decide ties, and the original's steps are those of the sum
    positions = accumulate(repeat(stride, max(count - 1, 0)), initial=0.0)
    return [round(position) for position in positions][:count]


def respace(betas: np.ndarray, timesteps: list[int]) -> np.ndarray:
    """The variances of the process that visits only ``timesteps``: (T,) -> (len(timesteps),).

    Source: Nichol & Dhariwal 2021, equation 19.
    """
    alphas_cumprod = np.cumprod(1 - betas)[timesteps]
    return 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
