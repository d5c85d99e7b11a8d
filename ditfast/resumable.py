"""A folder of files determined by settings, so an interrupted run can resume in it."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ditfast.atomic import atomic_write
from ditfast.run_lock import LOCK
from ditfast.small_files import read_object


class ResumableFolder:
    """A folder of finished files and a record of the settings that determine them.

    Subclasses define what the files are.

    Args:
        path: the folder.
        settings: JSON values.
    """

    record: str  # name of the settings file
    holds: str  # what error messages call the files
    pattern: str  # regular expression of the file names
    error: type[Exception]  # exception to raise

    def __init__(self, path: str | Path, settings: dict[str, Any]):
        self.path, self.settings = Path(path), json.loads(json.dumps(settings))  # tuples become lists, as in the file

    def check(self, overwrite: bool) -> None:
        """Reject a folder with other settings unless ``overwrite``, and one with unrelated files always."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise self.error(f"--out {self.path} is not a folder")
        if not (self.path / self.record).exists() and any(each.name != LOCK for each in self.path.iterdir()):
            raise self.error(f"--out {self.path} holds other files but no {self.record}: choose another --out")
        differences = self.differences()
        if differences and not overwrite:
            raise self.error(
                f"--out {self.path} holds {self.holds} from another run ({', '.join(differences)}): "
                "choose another --out, or start over with --overwrite"
            )

    def start(self, **about: Any) -> None:
        """Prepare the folder: keep finished files only if their settings match, and record settings and ``about``."""
        with self.writing(self.path / self.record) as part:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.differences():
                self.clear()
            write_json(part, {**self.settings, **about})

    def clear(self) -> None:
        """Remove the finished files and nothing else."""
        for file in self.path.iterdir():
            if re.fullmatch(self.pattern, file.name):
                file.unlink()

    def differences(self) -> list[str]:
        """One description per setting that differs from the folder's; empty if the folder has no record."""
        if not (self.path / self.record).exists():
            return []
        found = read_json(self.path / self.record)
        if found is None:
            return [f"{self.record} cannot be read"]
        now, then = self.comparable(self.settings), self.comparable(found)
        names = [name for name in now | then if now.get(name) != then.get(name)]
        return [f"{name} was {_short(then.get(name))}, is {_short(now.get(name))}" for name in names]

    def comparable(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The subset of recorded settings that distinguishes runs."""
        return settings

    @contextmanager
    def writing(self, path: Path) -> Iterator[Path]:
        """`atomic_write` with an error that says how to resume."""
        try:
            with atomic_write(path) as part:
                yield part
        except OSError as error:
            raise self.error(
                f"cannot write {path}: {error.strerror or error}; finished {self.holds} are kept; "
                "repeat the command to resume"
            ) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if it cannot be read."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _short(value):
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
