"""Two runs in one folder, ranks without peers, and ranks without a parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ditfast import encode, sample, train

FOREVER = ["--steps", 1_000_000, "--save-every", 1_000_000, "--log-every", 10]


@pytest.fixture
def busy(kit):
    """A folder with a run in progress."""
    process = kit.start("run", *FOREVER)[0]
    while not (kit.folder / "run" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.1)
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_rejected_and_may_take_over_a_killed_one(kit, busy, capsys):
    out = str(kit.folder / "run")
    commands = {
        train: [*kit.flags, "--data", "none", "--resume", "auto"],
        sample: ["--ckpt", "none", "--num-samples", "1"],
        encode: ["--data", "none"],
    }
    for command, options in commands.items():
        with pytest.raises(SystemExit) as stopped:
            command.main([*options, "--out", out])
        text = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and f"--out {out} is in use by pid {busy.pid} on" in text
        assert f"this is pid {os.getpid()}" in text and "--take-over" in text
    busy.kill()
    busy.wait()
    kit.train("run", "--resume", "auto", "--steps", 2)
    assert capsys.readouterr().err.count("taking over ") == 1
    assert not (kit.folder / "run" / ".lock").exists()


def test_taking_over_is_not_in_the_runs_config(kit):
    out = kit.train("run", "--steps", 1, "--take-over")
    assert "take_over" not in (out / "config.yaml").read_text()


def test_an_unwritable_folder_is_an_error_before_the_data_are_read(kit, capsys):
    (kit.folder / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        kit.train("file/run", "--data", "none")
    assert stopped.value.code == 2 and "file/run: Not a directory" in capsys.readouterr().err


def test_a_rendezvous_that_cannot_complete_ends(kit):
    started = time.monotonic()
    processes = kit.start("run", world=2, before="import os\nos.environ['DITFAST_RENDEZVOUS_SECONDS'] = '2'")
    processes[1].kill()
    code, text = kit.finish(processes)[0]
    assert code == 1 and "error: rank 0 of 2 did not reach the others at 127.0.0.1:" in text.splitlines()[-1]
    assert "within 2 seconds (set DITFAST_RENDEZVOUS_SECONDS to change this)" in text
    assert time.monotonic() - started < 120


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_ranks_exit_soon_after_their_torchrun_was_killed(kit):
    """They save a checkpoint and release the folder."""
    script = kit.folder / "ranks.py"
    note = f"open({str(kit.folder)!r} + '/pid' + os.environ['RANK'], 'w').write(str(os.getpid()))"
    script.write_text(f"import os\n{note}\nfrom ditfast import train\ntrain.main()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    out = kit.folder / "run"
    options = map(str, [*kit.flags, *FOREVER, "--out", out])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen([*torchrun, *options], env=environment, stderr=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").exists():
        assert launcher.poll() is None
        time.sleep(0.1)
    pids = [int((kit.folder / f"pid{rank}").read_text()) for rank in range(2)]
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.1)
    left = [pid for pid in pids if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left and len(list((out / "checkpoints").glob("step-*"))) == 1 and not (out / ".lock").exists()
