"""Where a run starts from, and whether it is the same run."""

from pathlib import Path

from ditfast.checkpoints.infer import argument
from ditfast.checkpoints.load import HOW_IT_RUNS
from ditfast.ranks import Ranks
from ditfast.training import TrainError
from ditfast.training.checkpoint import Checkpoints, checkpoint_at
from ditfast.training.config import Config
from ditfast.training.objective import describe_objective


def find_checkpoint(config: Config, checkpoints: Checkpoints) -> Path | None:
    """The checkpoint that the run starts from, if any: what the first rank sees, because others may see it later.

    Raises:
        TrainError: none where one was named, or the folder has a run that nobody asked to go on with.
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
            raise TrainError(f"--out {config.out} has a run ({found[-1].name}): --resume auto goes on with it")
        return None
    if config.resume == "auto":
        return checkpoints.newest_whole()
    if named := checkpoint_at(Path(config.resume)):
        return named
    raise TrainError(f"--resume must be auto, a checkpoint or the folder of a run, got {config.resume}")


def describe_sampling(config: Config, source, encoder) -> dict:
    """How to sample from what is trained, for `DiT.sampling`."""
    return {**describe_objective(config), "vae": encoder.vae, "classes": list(source.classes)}


def recorded_sampling(about: dict) -> dict:
    """The same of a checkpoint; those from before say no more than the schedule."""
    return about.get("sampling") or {"objective": "diffusion", "noise_schedule": about["noise_schedule"]}


def check_same_run(path: Path, then: dict, now: dict) -> None:
    """Refuse a checkpoint of another model or of other data; ``then`` and ``now`` say what each run is of.

    Raises:
        TrainError: naming the first difference.
    """
    sampling = recorded_sampling(then)
    then = {**then, "sampling": sampling if "sampling" in then else {**now["sampling"], **sampling}}
    then["model"] = {**{name: argument(then["model"], name) for name in now["model"]}, **then["model"]}
    for part in ("model", "data", "sampling", "seed"):
        name, was, is_ = _difference(part, then.get(part), now[part])
        if name:
            raise TrainError(f"{path} is of another run: {name} was {was!r}, is {is_!r}")


def _difference(part, then, now):
    if not isinstance(now, dict) or not isinstance(then, dict):
        return (part, then, now) if then != now else (None, None, None)
    for name in now | then:
        was, is_ = then.get(name), now.get(name)
        was, is_ = (list(v) if isinstance(v, tuple) else v for v in (was, is_))
        if name not in HOW_IT_RUNS and was != is_:
            return f"{part}'s {name}", was, is_
    return None, None, None
