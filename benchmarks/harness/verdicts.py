"""What follows from a case's parity: ditfast must keep the numerical contract, what it is compared with need not.

A case holds ``variant``, ``error`` (why it did not run) and ``parity`` (the worst of `ditfast.ops.contract.verdict`).
"""


def is_green(case: dict) -> bool:
    """Whether it ran, and nothing is held against its result."""
    return case["error"] is None and case["parity"]["reason"] is None


def is_excused(case: dict) -> bool:
    """Whether it misses its error budget, and PyTorch is to blame."""
    return is_green(case) and (case["parity"]["used"] or 0.0) > 1


def is_ours(variant: str) -> bool:
    return variant.startswith("ditfast")


def may_be_timed(case: dict) -> bool:
    """A wrong result of ditfast gets no speed; one of a baseline is timed, and marked."""
    return is_green(case) or case["error"] is None and not is_ours(case["variant"])


def passes(cases: list[dict], asked=("ditfast",)) -> bool:
    """Whether ditfast is right in each of its cases, and has one if it is among the variants ``asked`` for."""
    ours = [case for case in cases if is_ours(case["variant"])]
    return all(map(is_green, ours)) and (bool(ours) or not any(map(is_ours, asked)))
