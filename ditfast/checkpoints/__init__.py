"""Weights on disk: the original's files, this package's folders, diffusers' format. No file content is executed."""

from ditfast.checkpoints.convert import from_diffusers, match_original, patch_diffusers, to_diffusers
from ditfast.checkpoints.files import find_model
from ditfast.checkpoints.infer import infer_config
from ditfast.checkpoints.load import from_pretrained, load_into, read_sampling, save_pretrained

__all__ = [
    "find_model",
    "from_diffusers",
    "from_pretrained",
    "infer_config",
    "load_into",
    "match_original",
    "patch_diffusers",
    "read_sampling",
    "save_pretrained",
    "to_diffusers",
]
