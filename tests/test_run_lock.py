"""One run at a time in a folder."""

import json
import os
import signal
import subprocess
import sys
from threading import Barrier, Thread

import pytest

from ditfast.ranks import Ranks
from ditfast.run_lock import LOCK, FolderError, Lock, run_lock


@pytest.fixture
def other():
    """A live process."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs" / "one"


def lock_of(folder, **changes):
    """Give the lock to another run."""
    folder.mkdir(parents=True)
    (folder / LOCK).write_text(json.dumps({**Lock(folder).own, **changes}))


def started(pid):
    from ditfast.run_lock import _started

    return _started(pid)


def test_a_lock_names_its_owner_and_is_removed(folder):
    with run_lock(folder, Ranks()):
        found = json.loads((folder / LOCK).read_text())
        assert found["pid"] == os.getpid() and "python" in found["command"]
    assert not folder.parent.exists()  # nor are empty folders left behind


def test_a_runs_output_is_kept(folder):
    with pytest.raises(ZeroDivisionError), run_lock(folder, Ranks()):
        (folder / "a").touch()
        1 / 0  # noqa: B018
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_live_run_keeps_its_folder(folder, other):
    lock_of(folder, pid=other.pid, started=started(other.pid), command="train --seed 3")
    with pytest.raises(
        FolderError, match=rf"in use by pid {other.pid} on .*--seed 3.* pid {os.getpid()} .*--take-over"
    ):
        run_lock(folder, Ranks()).__enter__()
    assert json.loads((folder / LOCK).read_text())["pid"] == other.pid


@pytest.mark.parametrize("gone", ["killed", "zombie", "another start"])
def test_the_folder_of_a_dead_run_is_taken_over(folder, other, gone, capsys):
    lock_of(folder, pid=other.pid, started="then" if gone == "another start" else started(other.pid))
    if gone != "another start":
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT) if gone == "zombie" else other.wait()
    with run_lock(folder, Ranks()):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    told = capsys.readouterr().err.splitlines()
    assert (
        len(told) == 1
        and f"taking over {folder} from pid {other.pid} on" in told[0]
        and "that process is gone" in told[0]
    )
    assert list(folder.iterdir()) == []


def test_a_run_on_another_host_counts_as_live(folder, monkeypatch):
    lock_of(folder, host="elsewhere", pid=1)
    with pytest.raises(FolderError, match="in use by pid 1 on elsewhere"):
        run_lock(folder, Ranks()).__enter__()
    with run_lock(folder, Ranks(), take_over=True):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("name", "free"), [("job-7", True), ("none", False)])
def test_torchrun_may_move_the_first_rank(folder, monkeypatch, name, free):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    lock_of(folder, host="elsewhere")
    if free:
        with run_lock(folder, Ranks()):
            return
    with pytest.raises(FolderError):
        run_lock(folder, Ranks()).__enter__()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"host": 3}', b"[" * 100_000])
def test_an_unreadable_lock_belongs_to_an_unknown_run(folder, content, monkeypatch):
    monkeypatch.setattr("ditfast.run_lock.PATIENCE", 0.1)
    folder.mkdir(parents=True)
    (folder / LOCK).write_bytes(content)
    with pytest.raises(FolderError, match="an unknown run"):
        run_lock(folder, Ranks()).__enter__()
    with run_lock(folder, Ranks(), take_over=True):
        pass


def test_a_lock_that_was_taken_over_is_not_removed(folder):
    with run_lock(folder, Ranks()):
        (folder / LOCK).write_text(json.dumps({**Lock(folder).own, "pid": 1}))
    assert json.loads((folder / LOCK).read_text())["pid"] == 1


def test_only_one_of_many_takes_over(folder):
    """Even if all of them have seen the dead run."""
    lock_of(folder, started="then")
    barrier, results = Barrier(8), []

    def take(number):
        lock = Lock(folder)
        lock.own = {**lock.own, "command": str(number)}
        barrier.wait()
        try:
            lock.take()
            results.append(number)
        except FolderError:
            pass

    threads = [Thread(target=take, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [str(each) for each in results] == [json.loads((folder / LOCK).read_text())["command"]]


def test_a_signal_releases_the_lock(folder):
    code = f"""
import time
from ditfast.ranks import Ranks
from ditfast.run_lock import run_lock
with run_lock({str(folder)!r}, Ranks()):
    print("here", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert b"KeyboardInterrupt" in process.communicate(timeout=60)[1]
    assert not folder.exists()


def test_a_path_that_is_not_a_folder(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(FolderError, match=f"--out {path}(: Not a directory| is not a folder)"):
            run_lock(path, Ranks()).__enter__()
