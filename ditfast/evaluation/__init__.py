"""The parts of `python -m ditfast.evaluate`: images, their features, the numbers that compare two sets of them."""


class EvaluationError(Exception):
    """What the user has to change, in one line."""
