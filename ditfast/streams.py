"""Standard streams that may close while a command is running, as in ``2>&1 | head``."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Replace sys.stdout and sys.stderr by streams that never fail: output to a closed pipe is dropped."""
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
        except UnicodeError:  # for example a file name that the encoding of the stream cannot represent
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
        """Redirect the rest of the buffer and all later output, including that of C libraries, to /dev/null."""
        with suppress(OSError, ValueError):  # a stream without a file descriptor
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()
