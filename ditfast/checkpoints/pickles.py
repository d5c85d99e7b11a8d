"""Read files of torch.save without executing anything in them."""

import argparse
import datetime
import errno
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

PATHS: dict[str, type[pathlib.PurePath]] = {"Posix": pathlib.PurePosixPath, "PurePosix": pathlib.PurePosixPath}
PATHS |= {"Windows": pathlib.PureWindowsPath, "PureWindows": pathlib.PureWindowsPath}


def read_pickle(path: Path) -> Any:
    """Read a file. A zip's tensors are memory-mapped, because a training checkpoint holds four times the weights.

    Raises:
        OSError, ValueError: see `reading`.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_members(path)
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _check_members(path):
    """Reject compressed members: they may expand to any size, and would be mapped without being decompressed."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # a broken file can raise anything
        raise ValueError(f"{path} is truncated or not a checkpoint ({type(error).__name__})") from None
    for each in members:
        if each.compress_type != zipfile.ZIP_STORED or each.file_size != each.compress_size:
            raise ValueError(f"{path} is compressed, which torch.save's files are not: {each.filename}")


@contextmanager
def reading(path: Path | str) -> Iterator[None]:
    """A context for torch.load that allows what training scripts store beside weights, and translates errors.

    Raises:
        OSError: from the system.
        ValueError: the file is truncated or not a checkpoint, or reading it would execute code.
    """
    try:
        with torch.serialization.safe_globals(_allowed()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about another pickle protocol, an error below
            yield
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from None
    except Exception as error:  # a broken file can raise anything: RuntimeError, EOFError, KeyError, struct.error, …
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # EINVAL: a broken zip
            raise
        what = "a TorchScript archive" if "TorchScript" in str(error) else "truncated"
        raise ValueError(f"{path} is {what} or not a checkpoint ({type(error).__name__})") from None


def _refusal(path, text):
    """Replaces PyTorch's error, which recommends executing the file."""
    if called := re.search(r"GLOBAL (\S+)|function (\S+)|Can only (?:build|create) .* got (.+)", text):
        name = next(filter(None, called.groups()))
        return ValueError(f"{path} is refused: reading it would run {name}; nothing was executed")
    if re.search(r"Unsupported operand (149|150|14[0-8])\b", text):  # what came with protocol 4
        return ValueError(
            f"{path} is pickled with protocol 4 or later, which is not supported: save it with torch.save's default"
        )
    return ValueError(f"{path} is truncated or not a checkpoint")


def _allowed():
    """Types that training scripts store beside weights. Constructing them has no side effects."""
    scalar, array = (value.__reduce__()[0] for value in (np.float64(0), np.zeros(0)))
    numpy = [(scalar, f"{core}.multiarray.scalar") for core in ("numpy.core", "numpy._core")]
    numpy += [(array, f"{core}.multiarray._reconstruct") for core in ("numpy.core", "numpy._core")]
    numpy += [np.ndarray, (np.dtype, "numpy.dtype"), *{type(np.dtype(code)) for code in np.typecodes["All"]}]
    # paths may come from another system, and Python 3.13 renamed their module
    paths = [(kind, f"{home}.{name}Path") for name, kind in PATHS.items() for home in ("pathlib", "pathlib._local")]
    plain = [(kind, f"builtins.{kind.__name__}") for kind in (bool, dict, float, frozenset, int, list, range, str)]
    plain += [(_plain_dict, "collections.defaultdict"), (_plain_list, "collections.deque")]
    spaces = [argparse.Namespace, types.SimpleNamespace]
    return [*numpy, *paths, *plain, *spaces, datetime.datetime, datetime.timedelta, torch.torch_version.TorchVersion]


def _plain_dict(make_missing=None):
    return {}


def _plain_list(items=(), length=None):
    return list(items)
