"""Verdicts on cases: ditfast must meet the numerical contract, its competitors need not.

A case has ``variant``, ``error`` (why it did not run) and ``parity`` (the worst of `ditfast.ops.contract.verdict`).
"""


def is_green(case: dict) -> bool:
    """Whether the case ran, with a correct or excused result."""
    return case["error"] is None and case["parity"]["reason"] is None


def is_excused(case: dict) -> bool:
    """Whether the case exceeds its error budget because of PyTorch."""
    return is_green(case) and (case["parity"]["used"] or 0.0) > 1


def is_ours(variant: str) -> bool:
    return variant.startswith("ditfast")


def may_be_timed(case: dict) -> bool:
    """Whether to time a case: wrong results of ditfast are not timed, those of a baseline are timed and marked."""
    return is_green(case) or case["error"] is None and not is_ours(case["variant"])


def passes(cases: list[dict], asked=("ditfast",)) -> bool:
    """Whether all cases of ditfast are correct, and at least one exists if the variants ``asked`` include it."""
    ours = [case for case in cases if is_ours(case["variant"])]
    return all(map(is_green, ours)) and (bool(ours) or not any(map(is_ours, asked)))
