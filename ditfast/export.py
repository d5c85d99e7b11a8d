"""Export a training checkpoint as a model: config.json and model.safetensors.

    python -m ditfast.export runs/xl2 xl2-model
    python -m ditfast.sample --ckpt xl2-model --classes 207 360

For a run's folder, the newest checkpoint is used.
"""

from ditfast.entry import before_imports, command

if __name__ == "__main__":
    before_imports()

import sys
from pathlib import Path
from typing import Any, Literal

import torch

from ditfast.checkpoints import load_into, save_pretrained
from ditfast.command import Parser, words
from ditfast.models import DiT
from ditfast.models.meta import on_meta
from ditfast.paths import check_paths
from ditfast.ranks import Ranks
from ditfast.training import TrainError
from ditfast.training.average import youth
from ditfast.training.checkpoint import Checkpoints, checkpoint_at, is_run
from ditfast.training.resume import recorded_sampling


def export(
    checkpoint: Path, folder: Path, weights: Literal["ema", "model"] = "ema", overwrite: bool = False
) -> dict[str, Any]:
    """Write a checkpoint's EMA ("ema") or last ("model") weights, in float32, for `DiT.from_pretrained`.

    Returns:
        The checkpoint's record.

    Raises:
        TrainError: the checkpoint is incomplete.
        FileExistsError: the folder has a model and ``overwrite`` is false.
    """
    checkpoints = Checkpoints(checkpoint.parent, 1, Ranks())
    about = checkpoints.read_about(checkpoint)
    with on_meta():
        model = DiT(**about["model"])
    model.sampling = recorded_sampling(about)
    names = {name: f"{weights if p.requires_grad else 'model'}.{name}" for name, p in model.named_parameters()}
    tensors = {names[name]: torch.empty(p.shape, device="cpu") for name, p in model.named_parameters()}
    checkpoints.read_tensors(checkpoint, tensors)
    load_into(model, {name: tensors[stored] for name, stored in names.items()})
    save_pretrained(model, folder, overwrite=overwrite)
    return about


@command()
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m ditfast.export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder")
    parser.add_argument("folder", type=Path, help="output folder of config.json and model.safetensors")
    parser.add_argument(
        "--weights", choices=("ema", "model"), default="ema", help="which weights: their average or the last (ema)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    o = parser.parse_args(words(arguments))
    check_paths(parser, o, "checkpoint", "folder")
    try:
        checkpoint = checkpoint_at(o.checkpoint)
        if checkpoint is None:
            why = "has no checkpoint yet" if is_run(o.checkpoint) else "is neither a checkpoint nor a run"
            raise TrainError(f"{o.checkpoint} {why}")
        about = export(checkpoint, o.folder, o.weights, o.overwrite)
    except FileExistsError:
        sys.exit(f"error: {o.folder} already has a model: choose another folder, or replace it with --overwrite")
    except (TrainError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    young = youth(about["step"], about["config"]["ema"], about.get("ema_warmup", False))
    if young and o.weights == "ema":
        print(f"warning: {young}: --weights model exports the last weights", file=sys.stderr)
    print(o.folder)


if __name__ == "__main__":
    main()
