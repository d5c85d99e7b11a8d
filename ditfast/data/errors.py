"""Errors of training data."""


class DataError(Exception):
    """A user error, as one line that says what to change."""


class Unreadable(Exception):
    """An item of the data is broken. The message names its file."""
