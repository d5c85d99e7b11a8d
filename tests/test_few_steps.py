"""examples/few_steps: equal cost, the demo's weights, what is compared, and that the docs show the results."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ditfast import DiT
from ditfast.sampling.demo import ONE_STEP
from ditfast.training.config import Config, fill_defaults
from ditfast.training.objective import make_objective

for package in ("matplotlib", "sklearn", "tqdm"):
    pytest.importorskip(package)
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "few_steps"
NAMES = ("training", "comparison", "report", "run", "digits")


@pytest.fixture(scope="module")
def few_steps():
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.syspath_prepend(FOLDER)
    for name in NAMES:  # pytest may have imported other modules with these names
        patch.delitem(sys.modules, name, raising=False)
    torch.set_num_threads(1)
    yield SimpleNamespace(**{name: import_module(name) for name in NAMES})
    for name in NAMES:
        sys.modules.pop(name, None)
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture
def run(few_steps, monkeypatch, tmp_path):
    """Run the command with its folders in tmp_path."""
    few_steps.training.BATCH = 32

    def command(*options, models="models"):
        own = ("--models", tmp_path / models, "--results", tmp_path / "results")
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, (*own, *options))])
        few_steps.run.main()

    yield command
    few_steps.training.BATCH = 256


def test_all_trainings_cost_what_ditfast_train_counts(few_steps):
    configs = [fill_defaults(Config(objective=objective), "cpu") for objective in few_steps.training.COST]
    assert {c.objective: make_objective(c, 10).forwards for c in configs} == few_steps.training.COST


def test_the_same_seed_makes_the_same_model_as_the_demos(run, tmp_path):
    def weights(models, seed=0):
        run("--only", "meanflow", "--forwards", 12, "--seed", seed, models=models)
        return (tmp_path / models / f"forwards-12-seed-{seed}/meanflow/model.safetensors").read_bytes()

    made = weights("a")
    assert weights("b") == made and weights("b", seed=1) != made
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    weights("a")
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    folders = tmp_path / "a/forwards-12-seed-0/meanflow", ONE_STEP["ckpt"]
    model, shipped = (DiT.from_pretrained(folder) for folder in folders)
    assert model.config == shipped.config and model.sampling == shipped.sampling
    assert model.pos_embed.dtype == shipped.pos_embed.dtype == torch.float16
    assert torch.isfinite(model.final_layer.linear.weight).all() and model.final_layer.linear.weight.any()


def test_what_is_compared(run, few_steps, tmp_path, capsys):
    run("--forwards", 12, "--count", 40)
    found = json.loads((tmp_path / "results/few_steps.json").read_text())
    assert [each["training_steps"] for each in found["objectives"].values()] == [4, 4, 3]
    assert found["known"]["right"] > 0.96 and found["known"]["frechet"] < 1 < found["noise"]["frechet"]
    for each in found["objectives"].values():
        assert [*each["steps"]] == ["1", "2", "4", "25"] and min(n["ms"] for n in each["steps"].values()) > 0
        assert each["steps"]["1"]["frechet"] > 2  # untrained
    assert found["known"]["spread"] == pytest.approx(1, abs=0.1)
    assert (tmp_path / "results/few_steps.png").stat().st_size > 1000
    assert few_steps.report.table(found) in capsys.readouterr().out


def test_a_sampler_calls_the_model_once_in_each_step(few_steps):
    for objective in few_steps.training.COST:
        model, calls = few_steps.training.Training(objective, 1, 0).average, []
        model.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        noise, y = torch.randn(3, 1, 8, 8), torch.tensor([3, 0, 9])
        for steps in (1, 2, 25):
            calls.clear()
            x = few_steps.comparison.sample(objective, model, noise, y, steps)
            assert x.shape == noise.shape and len(calls) == steps


@pytest.mark.parametrize("option, value, least", [("--forwards", 3, 4), ("--count", 39, 40)])
def test_refusals(run, capsys, tmp_path, option, value, least):
    with pytest.raises(SystemExit, match="2"):
        run(option, value)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"{option} must be at least {least}, got {value}")
    assert not list(tmp_path.iterdir())


def test_docs_show_what_was_measured(few_steps):
    found = json.loads((FOLDER / "results/few_steps.json").read_text())
    shown = (ROOT / "docs/flow.md").read_text()
    report = few_steps.report
    assert shown.split(report.START)[1].split(report.END)[0].strip() == report.table(found)
    one_step = {name: each["steps"]["1"] for name, each in found["objectives"].items()}
    assert one_step["meanflow"]["right"] > found["known"]["right"]
    assert 5 * one_step["meanflow"]["frechet"] < min(one_step[name]["frechet"] for name in ("diffusion", "flow"))
