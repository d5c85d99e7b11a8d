"""Safe reading of .metadata, the pickled index of a checkpoint's tensors: only its own types are unpickled."""

import pickle
import re
from pathlib import Path, PurePosixPath

import torch
from torch.distributed.checkpoint import FileSystemReader, filesystem, metadata

INDEX = ".metadata"
PARTS = r"__\d+_\d+\.distcp"  # names of the tensor files
ALLOWED = {
    (metadata.__name__, name)
    for name in (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    )
} | {(filesystem.__name__, "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}


class Reader(FileSystemReader):
    """FileSystemReader with restricted unpickling; PyTorch's unpickles anything."""

    def read_metadata(self, *given, **options) -> metadata.Metadata:
        index = read_index(Path(self.path))
        index.storage_meta = metadata.StorageMeta(load_id=self.load_id)
        return index


def read_index(folder: Path) -> metadata.Metadata:
    """Read the tensor index in a folder.

    Raises:
        ValueError: unpickling would run other code, it lists non-tensor objects, which PyTorch would unpickle, or it
            names files outside the folder.
    """
    try:
        with open(folder / INDEX, "rb") as file:
            index = _Unpickler(file).load()
    except _Refused as error:
        raise ValueError(f"{INDEX} is refused: reading it would run {error}; nothing was executed") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{INDEX} is damaged: {error!r}") from error
    try:
        kinds = {type(each) for each in index.state_dict_metadata.values()}
        files = {each.relative_path for each in index.storage_data.values()}
    except AttributeError as error:
        raise ValueError(f"{INDEX} is damaged: it is not a tensor index") from error
    if kinds != {metadata.TensorStorageMetadata}:
        raise ValueError(f"{INDEX} is refused: it lists non-tensor objects; nothing was executed")
    if strange := [name for name in files if not isinstance(name, str) or not re.fullmatch(PARTS, name)]:
        raise ValueError(f"{INDEX} is refused: it names {strange[0]!r}")
    return index


class _Refused(Exception):
    """Name of a function or class that unpickling would call."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and re.fullmatch("(Pure)?(Posix|Windows)Path", name):
            return PurePosixPath  # the path it was written to, on any system; never used
        raise _Refused(f"{module}.{name}")
