"""Suggestions for mistyped names."""

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: object, names: Iterable[str], cutoff: float = 0.3) -> str:
    """Suffix for an error message: suggests the closest of ``names``, or is empty if none is close.

    Args:
        cutoff: required similarity, from 0 to 1; higher where the name may be valid but missing, such as a path.
    """
    near = get_close_matches(str(name), list(names), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
