"""Read what torch.save wrote, without executing anything that is in it."""

import argparse
import datetime
import errno
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from contextlib import contextmanager

import numpy as np
import torch

PATHS = {"Posix": pathlib.PurePosixPath, "PurePosix": pathlib.PurePosixPath}
PATHS |= {"Windows": pathlib.PureWindowsPath, "PureWindows": pathlib.PureWindowsPath}


def read_pickle(path):
    """What is in a file; a zip's tensors are mapped, because a training checkpoint holds four times the weights.

    Raises:
        ValueError: as `reading` says.
    """
    is_zip = zipfile.is_zipfile(path)
    if is_zip:
        _check_members(path)
    with reading(path):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _check_members(path):
    """Refuse members that are packed: they may be of any size, and would be mapped as they lie in the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # a broken file can raise anything
        raise ValueError(f"{path} is truncated or no checkpoint ({type(error).__name__})") from None
    for each in members:
        if each.compress_type != zipfile.ZIP_STORED or each.file_size != each.compress_size:
            raise ValueError(f"{path} is compressed, which torch.save's files are not: {each.filename}")


@contextmanager
def reading(path):
    """Around torch.load: what may be beside weights, and errors of this package.

    Raises:
        OSError: the system's.
        ValueError: the file is truncated or no checkpoint, or would have to execute code to be read.
    """
    try:
        with torch.serialization.safe_globals(_allowed()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another protocol of pickle, which is an error below
            yield
    except pickle.UnpicklingError as error:
        raise _refusal(path, str(error)) from None
    except Exception as error:  # a broken file can raise anything: RuntimeError, EOFError, KeyError, struct.error, …
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a broken zip gives
            raise
        what = "a TorchScript archive" if "TorchScript" in str(error) else "truncated"
        raise ValueError(f"{path} is {what} or no checkpoint ({type(error).__name__})") from None


def _refusal(path, text):
    """An error in the place of PyTorch's, which recommends to execute what is in the file."""
    if called := re.search(r"GLOBAL (\S+)|function (\S+)|Can only (?:build|create) .* got (.+)", text):
        name = next(filter(None, called.groups()))
        return ValueError(f"{path} is refused: reading it would run {name}; nothing was executed")
    if re.search(r"Unsupported operand (149|150|14[0-8])\b", text):  # what came with protocol 4
        return ValueError(
            f"{path} is pickled with protocol 4 or later, of which nothing is read: save it with torch.save's default"
        )
    return ValueError(f"{path} is truncated or no checkpoint")


def _allowed():
    """What training scripts keep beside weights. To make such a value does nothing else."""
    scalar, array = (value.__reduce__()[0] for value in (np.float64(0), np.zeros(0)))
    numpy = [(scalar, f"{core}.multiarray.scalar") for core in ("numpy.core", "numpy._core")]
    numpy += [(array, f"{core}.multiarray._reconstruct") for core in ("numpy.core", "numpy._core")]
    numpy += [np.ndarray, (np.dtype, "numpy.dtype"), *{type(np.dtype(code)) for code in np.typecodes["All"]}]
    # a path need not be of this system, and Python 3.13 calls its module otherwise
    paths = [(kind, f"{home}.{name}Path") for name, kind in PATHS.items() for home in ("pathlib", "pathlib._local")]
    plain = [(kind, f"builtins.{kind.__name__}") for kind in (bool, dict, float, frozenset, int, list, range, str)]
    plain += [(_plain_dict, "collections.defaultdict"), (_plain_list, "collections.deque")]
    spaces = [argparse.Namespace, types.SimpleNamespace]
    return [*numpy, *paths, *plain, *spaces, datetime.datetime, datetime.timedelta, torch.torch_version.TorchVersion]


def _plain_dict(make_missing=None):
    return {}


def _plain_list(items=(), length=None):
    return list(items)
