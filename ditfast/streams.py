"""Standard streams that may go away while a command works on, as those of ``2>&1 | head`` do."""

import io
import os
import sys
from contextlib import contextmanager, suppress


@contextmanager
def lasting_streams():
    """sys.stdout and sys.stderr, to which writing never fails: what nobody can read any more is dropped."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Lasting, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class _Lasting:
    def __init__(self, stream):
        self._stream = stream or io.StringIO()  # None where it was closed before Python started

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text) -> int:
        try:
            self._try(self._stream.write, text)
        except UnicodeError:  # a name of a file that the stream's encoding does not have
            self._try(self._stream.write, text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call, *given):
        try:
            call(*given)
        except OSError:
            self._drop()
        except ValueError:
            if not self._stream.closed:
                raise

    def _drop(self):
        """Send what is left in the buffer, and all that follows, also from libraries in C, nowhere."""
        with suppress(OSError, ValueError):  # a stream without a file
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()
