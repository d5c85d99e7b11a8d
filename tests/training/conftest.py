"""Small training runs, in this process and in others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ditfast import train

MODEL = ["--depth", "2", "--hidden-size", "24", "--num-heads", "3", "--patch-size", "2"]
SHORT = ["--steps", "6", "--batch", "6", "--log-every", "1", "--save-every", "2", "--lr", "1e-2", "--ema", "0.8"]
QUIET = ["--sample-every", "0", "--workers", "0"]
NEEDED = ("sklearn", "tyro", "tensorboard", "tqdm", "yaml", "safetensors")
FLAGS = [*MODEL, *SHORT, *QUIET]


class Kit:
    flags = FLAGS

    def __init__(self, folder: Path):
        self.folder = folder

    def train(self, name: str, *flags) -> Path:
        """Run in this process; flags follow those of a small run."""
        return self.bare(name, *MODEL, *flags)

    def bare(self, name: str, *flags) -> Path:
        """The same without flags for the architecture."""
        out = self.folder / name
        train.main([*SHORT, *QUIET, "--out", str(out), *map(str, flags)])
        return out

    def lines(self, out: Path) -> list[dict]:
        return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

    def losses(self, out: Path) -> list[tuple]:
        """What a run computed at each step: (step, loss, gradient norm)."""
        return [(line["step"], line["loss"], line["grad_norm"]) for line in self.lines(out)]

    def start(self, name: str, *flags, world: int = 1, before: str = "") -> list[subprocess.Popen]:
        """Start a run in new processes, as torchrun would; ``before`` is Python code that they run first."""
        code = f"{before}\nfrom ditfast import train\ntrain.main()"
        command = [sys.executable, "-c", code, *FLAGS, "--out", str(self.folder / name), *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)} for r in range(world)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return [subprocess.Popen(command, env=environment | (r if world > 1 else {}), **pipes) for r in ranks]

    def finish(self, processes) -> list[tuple[int, str]]:
        """Wait for all; return each one's exit status and output."""
        try:
            outputs = [process.communicate(timeout=240)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        return [(p.returncode, text) for p, text in zip(processes, outputs, strict=True)]

    def run(self, name: str, *flags, world: int = 1, before: str = "") -> Path:
        """A run in new processes that must succeed."""
        results = self.finish(self.start(name, *flags, world=world, before=before))
        assert all(code == 0 for code, _ in results), "\n".join(text for _, text in results)
        return self.folder / name


def _free_port() -> str:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    pass


@pytest.fixture
def kit(tmp_path):
    for module in NEEDED:
        pytest.importorskip(module)
    return Kit(tmp_path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A run of four steps with two checkpoints, for copying."""
    for module in NEEDED:
        pytest.importorskip(module)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in all tests here: other numbers of threads sum in another order
    out = Kit(tmp_path_factory.mktemp("trained")).train("run", "--steps", 4)
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def refused(kit, capsys):
    """Run with flags that must be rejected; return the single line of the error."""

    def run(*flags, name="refused"):
        with pytest.raises(SystemExit) as stopped:
            kit.train(name, *flags)
        text = str(stopped.value)
        assert text.startswith("error: ") and "\n" not in text
        return text

    return run
