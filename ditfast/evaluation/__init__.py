"""The parts of `python -m ditfast.evaluate`: images, features, and metrics that compare two sets of images."""


class EvaluationError(Exception):
    """A user error, as one line that says what to change."""
