"""Pipelines of diffusers: folders whose model_index.json lists parts, each in a subfolder of its own."""

from pathlib import Path

from ditfast.small_files import read_object

INDEX = "model_index.json"
MODEL, VAE = "transformer", "vae"  # the parts that are read


def has_vae(folder: Path) -> bool:
    """Whether this is a pipeline with an autoencoder."""
    return _is_pipeline(folder) and VAE in read_object(folder / INDEX)


def model_folder(folder: Path) -> Path:
    """The folder of the model: the part of a pipeline, or the given one.

    Raises:
        FileNotFoundError: the pipeline has no transformer.
    """
    if not _is_pipeline(folder):
        return folder
    index = read_object(folder / INDEX)
    if MODEL not in index:
        kind = index.get("_class_name", "pipeline")
        raise FileNotFoundError(f"{str(folder)!r} is a {kind} of diffusers without a {MODEL}")
    return folder / MODEL


def _is_pipeline(folder):
    return (folder / INDEX).is_file() and not (folder / "config.json").is_file()
