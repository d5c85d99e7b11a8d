"""A folder whose files follow from settings, so that a run that was interrupted can go on in it."""

import json
import re
from contextlib import contextmanager
from pathlib import Path

from ditfast.atomic import atomic_write
from ditfast.run_lock import LOCK
from ditfast.small_files import read_object


class ResumableFolder:
    """A folder of finished files, and a record of the settings that they follow from.

    Subclasses say what they hold.

    Args:
        path: of the folder.
        settings: JSON values.
    """

    record: str  # file of the settings
    holds: str  # what the files are called in errors
    pattern: str  # of the files' names
    error: type[Exception]  # what is raised

    def __init__(self, path, settings: dict):
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))  # lists for tuples, as in the file

    def check(self, overwrite: bool) -> None:
        """Refuse a folder of other settings, unless it may be overwritten, and one of something else, always."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise self.error(f"--out {self.path} is not a folder")
        if not (self.path / self.record).exists() and any(each.name != LOCK for each in self.path.iterdir()):
            raise self.error(f"--out {self.path} holds other files, and no {self.record}: choose another folder")
        differences = self.differences()
        if differences and not overwrite:
            raise self.error(
                f"--out {self.path} holds {self.holds} of another run ({', '.join(differences)}): "
                "choose another folder, or start it over with --overwrite"
            )

    def start(self, **about) -> None:
        """Make the folder ready: empty, or with finished files of the same settings. The record has ``about`` too."""
        with self.writing(self.path / self.record) as part:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.differences():
                self.clear()
            write_json(part, {**self.settings, **about})

    def clear(self) -> None:
        """Remove the finished files, and nothing else."""
        for file in self.path.iterdir():
            if re.fullmatch(self.pattern, file.name):
                file.unlink()

    def differences(self) -> list[str]:
        """Each setting that differs from those in the folder, as text; none where there are no settings."""
        if not (self.path / self.record).exists():
            return []
        found = read_json(self.path / self.record)
        if found is None:
            return [f"{self.record} cannot be read"]
        now, then = self.comparable(self.settings), self.comparable(found)
        names = [name for name in now | then if now.get(name) != then.get(name)]
        return [f"{name} was {_short(then.get(name))}, is {_short(now.get(name))}" for name in names]

    def comparable(self, settings: dict) -> dict:
        """Which of the settings, as they are in the record, tell runs apart."""
        return settings

    @contextmanager
    def writing(self, path):
        """`atomic_write`, with an error that tells how the run goes on."""
        try:
            with atomic_write(path) as part:
                yield part
        except OSError as error:
            raise self.error(
                f"cannot write {path}: {error.strerror or error}; finished {self.holds} stay, "
                "and the same command goes on from there"
            ) from error


def read_json(path: Path) -> dict | None:
    """The JSON object in a file; None if there is none."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
