"""Exceptions in results."""


def error_line(error: Exception) -> str:
    """Its type, and the first line of its message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
