"""One run at a time per folder: its .lock file names the owner."""

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ditfast.signals import interrupt, on_ending_signal

if TYPE_CHECKING:  # imports torch
    from ditfast.ranks import Ranks

LOCK = ".lock"
PATIENCE = 1.0  # seconds for another run to fill in the lock it has just created


class FolderError(Exception):
    """The output folder is locked by another run or not writable."""


@contextmanager
def run_lock(folder: str | Path, ranks: "Ranks", take_over: bool = False) -> Iterator[None]:
    """Lock a folder for the run of these ranks, creating it if needed.

    A lock can be taken over if its process no longer runs on this host, or if it belongs to this same torchrun, which
    has moved rank 0 to another host. It is released on every exit except SIGKILL: signals that end a run raise
    KeyboardInterrupt here.

    Args:
        take_over: take the lock over unconditionally.

    Raises:
        FolderError: on every rank.
    """
    lock, error = Lock(folder), None
    if ranks.is_first:
        try:
            lock.take(take_over)
        except FolderError as found:
            error = str(found)
    error = ranks.gather(error)[0]
    if error:
        raise FolderError(error)
    try:
        with on_ending_signal(interrupt):
            yield
    finally:
        if ranks.is_first:
            lock.release()


class Lock:
    """The lock of a folder, for this process."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.path = self.folder / LOCK
        self.own: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
            "command": shlex.join(sys.orig_argv),
            "torchrun": os.environ.get("TORCHELASTIC_RUN_ID", "none"),  # "none" is also torchrun's default ID
        }

    def take(self, take_over: bool = False) -> None:
        """Create the lock; see `run_lock`."""
        folder = self.folder
        self._made = [each for each in (folder, *folder.parents) if not each.exists()]
        while not self._create():
            other = self._read()
            if other is None:  # gone by now
                continue
            reason = self._why_free(other) or (take_over and "--take-over")
            if not reason:
                raise FolderError(
                    f"--out {folder} is in use by {_describe(other)}; this is {_describe(self.own)}: wait, choose "
                    "another folder, or pass --take-over if that run is certainly dead"
                )
            if self._remove(other):
                print(f"taking over {folder} from {_describe(other)}: {reason}", file=sys.stderr)

    def release(self) -> None:
        """Remove the lock, unless another run has taken it over, and the folders created for it that are empty."""
        with suppress(OSError):
            if self._read() == self.own:
                self.path.unlink()
            for folder in self._made:
                folder.rmdir()

    def _create(self) -> bool:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError as error:
            if not self.folder.is_dir():
                raise FolderError(f"--out {self.folder} is not a folder") from error
            return False
        except OSError as error:
            raise FolderError(f"cannot write --out {self.folder}: {error.strerror}") from error
        content = json.dumps(self.own, indent=1).encode()
        try:
            with open(file, "wb", buffering=0) as opened:
                whole = opened.write(content) == len(content)
                os.fsync(file)
        except OSError:
            whole = False
        if not whole:
            self.path.unlink()
            raise FolderError(f"cannot write --out {self.folder}: the disk may be full")
        return True

    def _read(self) -> dict | None:
        """Contents of the lock; {} if unreadable, None if there is no lock."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                return _parse(self.path.read_bytes())
            except FileNotFoundError:
                return None
            except (OSError, ValueError):
                if time.monotonic() > end:
                    return {}
                time.sleep(0.05)

    def _why_free(self, other):
        if other and other["host"] == self.own["host"]:
            return None if _started(other["pid"]) == other["started"] else "that process is gone"
        same = other and other["torchrun"] == self.own["torchrun"] != "none"
        return "it was a rank of this torchrun" if same else None

    def _remove(self, other) -> bool:
        """Remove the lock unless its owner has changed since it was read; returns whether it did."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # some network file systems lack flock
                fcntl.flock(folder, fcntl.LOCK_EX)  # one takeover at a time
            same = self._read() == other
            if same:
                self.path.unlink(missing_ok=True)
            return same
        finally:
            os.close(folder)


def _parse(content):
    """Fields of a lock file.

    Raises:
        ValueError: it is not a valid lock file.
    """
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError("not a lock") from error
    kinds = {"host": str, "pid": int, "started": str, "command": str, "torchrun": str}
    if not isinstance(found, dict) or any(type(found.get(name)) is not kind for name, kind in kinds.items()):
        raise ValueError("not a lock")
    return found


def _describe(lock):
    if not lock:
        return "an unknown run"
    command = " ".join(lock["command"].split())  # on one line
    return f"pid {lock['pid']} on {lock['host']} ({command if len(command) <= 100 else command[:97] + '...'})"


def _started(pid: int) -> str | None:
    """Start time of a process on this host, unique together with its pid; None if it has ended."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else f"{boot} {fields[18]}"  # clock ticks since boot
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    with suppress(PermissionError, OverflowError):  # not Linux
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
    return ""
