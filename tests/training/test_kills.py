"""Runs that are killed at random moments, whatever they are doing, end bit-identical."""

import random
import time
from pathlib import Path

import pytest

forked_ranks = pytest.importorskip("forked_ranks", exc_type=ImportError)  # it imports what a run needs
KILLS = 20


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_at_twenty_random_moments(kit, world, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(forked_ranks.__file__).parent))  # for the imports
    chance, log = random.Random(world), kit.folder / "log"
    flags = [
        *kit.flags,
        "--steps",
        40,
        "--save-every",
        4,
        "--sample-every",
        6,
        "--sample-steps",
        2,
        "--workers",
        world - 1,
    ]

    def start(name):
        return forked_ranks.start_ranks([*flags, "--out", kit.folder / name, "--resume", "auto"], world, log)

    def finish(processes):
        for process in processes:
            process.join(240)
        return [process.exitcode for process in processes]

    finish(start("warm"))  # the first one waits for the process that the others are forked from
    begun = time.monotonic()
    assert finish(start("whole")) == [0] * world, log.read_text()
    duration, kills, runs = time.monotonic() - begun, 0, 0
    while kills < KILLS:
        out, runs = kit.folder / f"run-{runs}", runs + 1
        codes = None
        while codes != [0] * world:
            processes = start(out.name)
            killed = chance.sample(processes, chance.randint(1, world))
            if kills < KILLS:
                time.sleep(chance.uniform(0, duration))
                for process in killed:
                    process.kill()
            codes = finish(processes)
            kills += -9 in codes
            assert -9 in codes or codes == [0] * world, log.read_text()
        assert kit.losses(out) == kit.losses(kit.folder / "whole")
        weights = [(run / "model" / "model.safetensors").read_bytes() for run in (out, kit.folder / "whole")]
        assert weights[0] == weights[1]
        assert not [path for path in out.rglob(".*") if path.name != ".metadata"]  # no locks, no partial files
