"""The files that `python -m ditfast.encode` writes, and `ditfast.data.latents` reads.

    latents-00000.safetensors, …   of a range of the images each, in their order, n of them:
        mean, std                  (n, C, h, w) float32 or float16: the posterior of an image, not scaled
        mean_flip, std_flip        the same of its mirror image, which is not the mirror image of the same
        labels                     (n,) int64
        with the names of the images that could not be read, as JSON under the metadata's "unreadable"
    encode.json                    what the shards follow from, and the command; written first
    latents.json                   all about them, and how many images are in each; written last

One image of size S takes 4 * C * (S / 8)^2 numbers, with C = 4: 64 KiB in float32 for S = 256. Half-precision rounds
the mean by up to 2^-11 of itself, which can be more than a posterior's std; so float32 unless the disk is too small.
"""

import json
import re
from pathlib import Path

from ditfast.checkpoints.files import need
from ditfast.data import DataError
from ditfast.sampling.files import writing

FORMAT = 1
TENSORS = ("mean", "std", "mean_flip", "std_flip")
INDEX, STARTED = "latents.json", "encode.json"


def unfinished(folder: Path) -> str | None:
    """What to do about a folder in which encode has not finished; None if it has not begun."""
    command = (_read(folder / STARTED) or {}).get("command")
    return command and f"{folder} is not finished: go on with {command}"


class Shards:
    """The folder of an encoding.

    Args:
        path: of the folder.
        settings: all that its content follows from, as JSON values.
        count: images, readable or not.
        size: of a shard's range of images.
    """

    def __init__(self, path, settings: dict, count: int, size: int):
        given = {"format": FORMAT, **settings, "shard_size": size}
        self.path, self.settings = Path(path), json.loads(json.dumps(given))  # lists for tuples, as in the file
        self.ranges = [range(start, min(start + size, count)) for start in range(0, count, size)]

    def file(self, shard: int) -> Path:
        return self.path / f"latents-{shard:05d}.safetensors"

    def check(self, overwrite: bool) -> None:
        """Refuse a folder of other settings, unless it may be overwritten, and one of something else, always."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise DataError(f"--out {self.path} is not a folder")
        if not (self.path / STARTED).exists() and any(self.path.iterdir()):
            raise DataError(f"--out {self.path} holds other files, and no {STARTED}: choose another folder")
        differing = self._differing()
        if differing and not overwrite:
            raise DataError(
                f"--out {self.path} holds latents of another run ({', '.join(differing)}): "
                "choose another folder, or start it over with --overwrite"
            )

    def start(self, command: str) -> None:
        """Make the folder ready: empty, or with finished shards of the same settings."""
        with writing(self.path / STARTED) as part:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._differing():
                (self.path / INDEX).unlink(missing_ok=True)  # first: without it nothing else is trusted
                for old in self.path.iterdir():
                    if re.fullmatch(r"latents-\d{5,}\.safetensors", old.name):
                        old.unlink()
            _write(part, {**self.settings, "command": command})

    def missing(self) -> list[int]:
        return [shard for shard in range(len(self.ranges)) if not self.file(shard).exists()]

    def write(self, shard: int, tensors: dict, unreadable: list[str]) -> None:
        content = need("safetensors.torch").save(tensors, {"unreadable": json.dumps(unreadable)})
        with writing(self.file(shard)) as part:
            part.write_bytes(content)

    def finish(self, classes: list[str]) -> dict:
        """Write the index of the shards, when they are all there. Returns it."""
        files = [self.file(shard) for shard in range(len(self.ranges))]
        found = [self._contents(file) for file in files]
        index = {
            **self.settings,
            **{"classes": classes, "count": sum(count for count, _ in found)},
            "unreadable": [name for _, names in found for name in names],
            "shards": [{"file": file.name, "count": count} for file, (count, _) in zip(files, found, strict=True)],
        }
        if not index["count"]:
            raise DataError("no image is readable")
        with writing(self.path / INDEX) as part:
            _write(part, index)
        return index

    def _contents(self, path):
        """How many images are in a shard, and the names of those left out."""
        package = need("safetensors")
        try:
            file = package.safe_open(path, "pt")
            return file.get_slice("labels").get_shape()[0], json.loads(file.metadata()["unreadable"])
        except (OSError, package.SafetensorError) as error:
            raise DataError(f"{path} is damaged: delete it, and encode again ({error})") from error

    def _differing(self):
        """Each setting that differs from those in the folder, as text; none where there are no settings."""
        if not (self.path / STARTED).exists():
            return []
        found = _read(self.path / STARTED)
        if found is None:
            return [f"{STARTED} cannot be read"]
        now, then = ({**each, **each.get("data", {})} for each in (self.settings, found))
        names = [name for name in now if name != "data" and now[name] != then.get(name)]
        return [f"{name} was {json.dumps(then.get(name))}, is {json.dumps(now[name])}" for name in names]


def _read(path):
    """The JSON object in a file; None if there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write(path, content):
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
