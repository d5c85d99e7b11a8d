"""The parts of `python -m ditfast.sample`: starting noise, sampling steps, decoding, output files."""


class SampleError(Exception):
    """A one-line message that says what the user has to change."""
