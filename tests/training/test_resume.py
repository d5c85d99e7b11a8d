"""A run that was stopped, killed or moved to other ranks continues as if uninterrupted."""

import json
import os
import signal
import subprocess
import sys
from threading import Thread

import pytest
import torch

from ditfast.ops.backends import on_cpu
from ditfast.training import loop
from ditfast.training.backends import compare_cpu, describe_cpu
from ditfast.training.manifest import ABOUT, read_about, write_about

PATCH = """
import os
from ditfast.ops.backends.choice import repeat_choices
from ditfast.training import loop
from ditfast.training.checkpoint import ABOUT
step = loop.Run._step
def patched(run, batch):
    if {condition}:
        os.kill(os.getpid(), {number})
    return step(run, batch)
loop.Run._step = patched
"""
KILL = PATCH.format(condition="run.step == 5 and run.ranks.rank == run.ranks.world - 1", number=9)


def test_a_killed_run_resumes_bit_for_bit(kit):
    whole = kit.train("whole", "--sample-every", 2, "--sample-steps", 2)
    code, _ = kit.finish(kit.start("killed", before=KILL))[0]
    assert code == -signal.SIGKILL
    killed = kit.folder / "killed"
    assert [line["step"] for line in kit.lines(killed)] == [1, 2, 3, 4, 5]
    kit.train("killed", "--resume", "auto")
    assert kit.losses(killed) == kit.losses(whole)
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (whole, killed)]
    assert weights[0] == weights[1]


def newest_about(run):
    return max((run / "checkpoints").glob("step-*")) / ABOUT


def test_a_run_resumes_with_its_backends(kit, capsys):
    """Its checkpoint's, not this process's own choice; missing ones are reported."""
    pytest.importorskip("ditfast._C")
    run = kit.train("run", "--steps", 2)
    about = read_about(newest_about(run).parent)
    assert about["backends"]["qkv_attention"] == "sdpa" and about["backends"]["mlp"] == "reference"
    assert about["cpu"] == {"isa": on_cpu.isa(), "threads": torch.get_num_threads()}
    about["cpu"] = {"isa": "mmx", "threads": 99}
    about["backends"] |= {"attention": "host", "qkv_attention": "host", "mlp": "triton", "patch_embed": "cudnn"}
    write_about(newest_about(run).parent, about)
    capsys.readouterr()
    kit.train("run", "--resume", "auto", "--steps", 4)
    backends = json.loads(newest_about(run).read_text())["backends"]
    assert backends["qkv_attention"] == "host"
    lines = capsys.readouterr().out.splitlines()
    for said in (
        "patch_embed used cudnn before, which cannot run here: patch_embed has no",
        f"the CPU kernels used mmx before and use {on_cpu.isa()} now: ",
        f"the run used 99 threads before and uses {torch.get_num_threads()} now: ditfast's kernels give identical ",
    ):
        assert sum(line.startswith(said) for line in lines) == 1


def test_nothing_is_reported_for_the_same_or_an_unknown_cpu():
    now = describe_cpu("cpu")
    assert compare_cpu(now, now) == compare_cpu(None, now) == compare_cpu(now, None) == []
    assert describe_cpu("cuda:0") is None


def test_torchrun_restarts_a_run_whose_rank_died(kit):
    whole, script = kit.run("whole", world=2), kit.folder / "dying.py"
    first = "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and run.step == 5 and run.ranks.rank == 1"
    script.write_text(PATCH.format(condition=first, number=9) + "from ditfast import train\ntrain.main()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = [
        *torchrun,
        "--max-restarts",
        "1",
        str(script),
        *kit.flags,
        "--out",
        str(kit.folder / "died"),
        "--resume",
        "auto",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "(step 4)" in done.stdout and "another rank has stopped" in done.stderr
    assert kit.losses(kit.folder / "died") == kit.losses(whole)


def test_another_number_of_ranks_resumes_up_to_rounding(kit):
    whole = kit.train("whole")
    moved = kit.run("moved", "--steps", 2, "--parallel", "fsdp", world=2)
    kit.train("moved", "--steps", 4, "--resume", "auto")
    kit.run("moved", "--resume", "auto", world=2)
    for (step, loss, norm), (other, expected, expected_norm) in zip(
        kit.losses(moved), kit.losses(whole), strict=True
    ):
        assert (step, loss, norm) == (
            other,
            pytest.approx(expected, rel=2e-5),
            pytest.approx(expected_norm, rel=1e-4),
        )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_resumes(kit, monkeypatch, capfd, number):
    whole, step = kit.train("whole"), loop.Run._step
    with monkeypatch.context() as patch:
        patch.setattr(
            loop.Run, "_step", lambda run, batch: (run.step == 2 and signal.raise_signal(number), step(run, batch))[1]
        )
        with pytest.raises(SystemExit) as stopped:
            kit.train("stopped", "--save-every", 100)
    assert stopped.value.code == 128 + number
    said = capfd.readouterr().err
    again = "; press Ctrl-C again to stop now" if number == signal.SIGINT else ""
    assert said.count(f"\nstopping after this step{again}\n") == 1
    assert said.splitlines()[-1] == "stopped after step 3 of 6; resume with --resume auto"
    kit.train("stopped", "--resume", "auto", "--save-every", 100)
    assert kit.losses(kit.folder / "stopped") == kit.losses(whole)


@pytest.mark.parametrize("where", ["step", "data"])
def test_an_error_of_what_the_signal_also_ended(kit, monkeypatch, capfd, where):
    """SIGTERM to a process group ends the compiler of a step, or a reader of data, as well."""

    def fail(*given):
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("CppCompileError: C++ compile error\n" + "x" * 10**5)

    if where == "step":
        monkeypatch.setattr(loop.Run, "_step", fail)
    else:
        monkeypatch.setattr(loop, "stream_batches", lambda *given, **options: map(fail, range(9)))
    with pytest.raises(SystemExit) as stopped:
        kit.train("run")
    assert stopped.value.code == 128 + signal.SIGTERM
    *_, warning, last = capfd.readouterr().err.splitlines()
    assert warning == "after the signal, step 1 ended in an error: RuntimeError: CppCompileError: C++ compile error"
    assert last == "stopped after step 0 of 6; resume with --resume auto"


def test_a_second_interrupt_does_not_wait(kit, monkeypatch, capfd):
    def twice(run, batch):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop.Run, "_step", twice)
    with pytest.raises(SystemExit) as stopped:
        kit.train("run")
    assert stopped.value.code == 130 and capfd.readouterr().err.splitlines()[-1].startswith("interrupted; --resume ")


def test_a_run_in_its_own_thread(kit):
    """As started by a server or a hyperparameter tuner; signals then belong to the main thread."""
    before, thread = signal.getsignal(signal.SIGTERM), Thread(target=kit.train, args=("thread", "--steps", 2))
    thread.start()
    thread.join()
    assert [line["step"] for line in kit.lines(kit.folder / "thread")] == [1, 2]
    assert (kit.folder / "thread" / "model").is_dir() and signal.getsignal(signal.SIGTERM) is before


def test_ranks_agree_when_one_is_stopped(kit):
    tell = PATCH.format(condition="run.step == 4 and run.ranks.rank == 1", number=int(signal.SIGTERM))
    results = kit.finish(kit.start("told", "--steps", 1000, "--save-every", 1000, before=tell, world=2))
    ends = {(code, text.splitlines()[-1]) for code, text in results}
    assert ends == {(143, "stopped after step 5 of 1000; resume with --resume auto")}
    assert [path.name for path in (kit.folder / "told" / "checkpoints").glob("*")] == ["step-00000005"]


def test_metrics_of_lost_steps_and_a_partial_line_are_removed(kit):
    out = kit.train("run", "--steps", 4)
    expected = kit.lines(out)[:2]
    (out / "metrics.jsonl").open("a").write('{"step": 5, "lo')
    kit.train("run", "--steps", 2, "--resume", str(out / "checkpoints" / "step-00000002"))
    assert kit.lines(out) == expected


def test_a_rewound_run_does_not_resume_from_later_checkpoints(kit):
    out = kit.train("run")
    first = out / "checkpoints" / "step-00000002"
    kit.train("run", "--steps", 3, "--keep", 1, "--lr", "1e-3", "--resume", first)
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-00000003"]
    assert len(list((out / "checkpoints").glob("left-step-*"))) == 2
    kit.train("run", "--steps", 4, "--lr", "1e-3", "--resume", "auto")
    assert [line["step"] for line in kit.lines(out)] == [1, 2, 3, 4]


def test_a_finished_run_is_not_changed(kit):
    out = kit.train("run")
    before = (out / "metrics.jsonl").read_text()
    kit.train("run", "--resume", "auto")
    assert (out / "metrics.jsonl").read_text() == before


def test_auto_starts_a_new_run_if_there_is_none(kit):
    assert len(kit.lines(kit.train("new", "--resume", "auto"))) == 6
