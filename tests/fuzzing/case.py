"""One case, and the fault in how it ended, if any."""

import re
from collections.abc import Callable
from typing import NamedTuple

NO_MEMORY = re.compile(r"MemoryError|[Oo]ut of memory|allocate memory|not enough memory|bad_alloc")


class Case(NamedTuple):
    """Something to run.

    ``bad`` is whether it must be refused; None if either is fine, e.g. for a byte without meaning.
    ``says`` must be in the refusal; of a tuple, at least one alternative.
    """

    what: str  # for humans
    run: Callable
    bad: bool | None
    says: str | tuple[str, ...] = ""
    is_command: bool = False


class End(NamedTuple):
    """How a case ended: "accepted", "refused" with its message, or "crashed" with any other exception."""

    how: str
    text: str = ""


def find_fault(case: Case, end: End, printed: str) -> str | None:
    """The fault in how a case ended, or None. ``printed`` is all output of the process."""
    if end.how == "crashed":
        return f"crashed: {end.text}"
    if NO_MEMORY.search(end.text + printed):
        return f"memory: {end.text}"
    if "Traceback (most recent call last)" in printed:
        return f"traceback: {printed[-700:]}"
    if end.how == "accepted":
        return "accepted" if case.bad else None
    if case.bad is False:
        return f"refused: {end.text}"
    if case.is_command and not end.text.strip():
        return "refused without a message"
    if not case.is_command and not end.text.strip():
        return "an exception without a message"
    says = case.says if isinstance(case.says, tuple) else (case.says,)
    if case.bad and not any(each in end.text + (printed if case.is_command else "") for each in says):
        return f"refused without {' or '.join(says)}: {end.text}"
    return None
