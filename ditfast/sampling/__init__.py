"""The parts of `python -m ditfast.sample`: what sample i starts from, its steps, its picture, the files."""


class SampleError(Exception):
    """What the user has to change, in one line."""
