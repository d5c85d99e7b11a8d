"""What can be wrong with data."""


class DataError(Exception):
    """What the user has to change, in one line."""


class Unreadable(Exception):
    """An item of the data is broken. The text names its file."""
