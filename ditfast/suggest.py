"""Suggestions in errors about a wrong name."""

from difflib import get_close_matches


def did_you_mean(name, names, cutoff: float = 0.3) -> str:
    """The end of an error that quotes ``name``: the nearest of ``names``, or nothing where none is near.

    Args:
        cutoff: how alike they must be, from 0 to 1; higher where a name may be right and just not there, as a path.
    """
    near = get_close_matches(str(name), names, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
