"""Training data: sources of samples, and streams of batches read from them.

`open_data` opens a `Source` by name; `ditfast.data.stream.stream_batches` reads it in an order determined by a seed.
"""

from ditfast.data.errors import DataError, Unreadable
from ditfast.data.protocol import Source
from ditfast.data.sources import open_data

__all__ = ["DataError", "Source", "Unreadable", "open_data"]
