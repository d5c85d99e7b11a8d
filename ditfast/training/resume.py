"""The checkpoint a run starts from, and whether it is of the same run."""

from pathlib import Path
from typing import Any

from ditfast.checkpoints.infer import argument
from ditfast.checkpoints.load import HOW_IT_RUNS
from ditfast.data import Source
from ditfast.ranks import Ranks
from ditfast.training import TrainError
from ditfast.training.checkpoint import Checkpoints, checkpoint_at, is_run
from ditfast.training.config import Config
from ditfast.training.encoder import Encoder
from ditfast.training.objective import describe_objective


def find_checkpoint(config: Config, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint to start from, if any, as rank 0 sees it: on a shared file system others may lag.

    Raises:
        TrainError: the named checkpoint does not exist, or the folder has a run and ``config.resume`` is None.
    """
    found = error = None
    if checkpoints.ranks.is_first:
        try:
            found = _find_here(config, Checkpoints(checkpoints.folder, config.keep, Ranks()))
        except TrainError as each:
            error = str(each)
    found, error = checkpoints.ranks.gather((found, error))[0]
    if error:
        raise TrainError(error)
    return found


def _find_here(config, checkpoints):
    if config.resume is None:
        if found := checkpoints.finished():
            raise TrainError(
                f"--out {config.out} already has a run ({found[-1].name}): pass --resume auto to resume it"
            )
        return None
    if config.resume == "auto":
        return checkpoints.newest_whole()
    if named := checkpoint_at(Path(config.resume)):
        return named
    if is_run(Path(config.resume)):
        raise TrainError(f"--resume {config.resume} has no checkpoint yet: use --resume auto to start at step 0")
    raise TrainError(f"--resume must be auto, a checkpoint or a run's folder, got {config.resume}")


def describe_sampling(config: Config, source: Source, encoder: Encoder) -> dict[str, Any]:
    """How to sample from the trained model, for `DiT.sampling`."""
    return {**describe_objective(config), "vae": encoder.vae, "classes": list(source.classes)}


def recorded_sampling(about: dict[str, Any]) -> dict[str, Any]:
    """How to sample from a checkpoint's model; older checkpoints record only the noise schedule."""
    return about.get("sampling") or {"objective": "diffusion", "noise_schedule": about["noise_schedule"]}


def check_same_run(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Reject a checkpoint of another model or other data.

    Args:
        then, now: ``Run.about`` of the checkpoint and of this run.

    Raises:
        TrainError: naming the first difference.
    """
    sampling = recorded_sampling(then)
    was, is_ = sampling["objective"], now["sampling"]["objective"]
    if was != is_:
        raise TrainError(f"--objective must be {was} to resume {path}, got {is_}: or choose another --out")
    then = {**then, "sampling": sampling if "sampling" in then else {**now["sampling"], **sampling}}
    then["sampling"] = {"guidance": now["sampling"].get("guidance"), **then["sampling"]}  # older files lack it
    then["model"] = {**{name: argument(then["model"], name) for name in now["model"]}, **then["model"]}
    for part in ("model", "data", "sampling", "seed"):
        name, was, is_ = _difference(part, then.get(part), now[part])
        if name:
            raise TrainError(f"{path} is from another run: {name} was {was!r}, is {is_!r}")


def _difference(part, then, now):
    if not isinstance(now, dict) or not isinstance(then, dict):
        return (part, then, now) if then != now else (None, None, None)
    for name in now | then:
        was, is_ = then.get(name), now.get(name)
        was, is_ = (list(v) if isinstance(v, tuple) else v for v in (was, is_))
        if name not in HOW_IT_RUNS and was != is_:
            return f"{part}'s {name}", was, is_
    return None, None, None
