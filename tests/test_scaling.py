"""examples/scaling: statistics, plan, resuming, and that the README shows what was measured."""

import json
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ditfast.data.glyphs import Glyphs

for package in ("diffusers", "matplotlib", "PIL", "tqdm"):
    pytest.importorskip(package)
FOLDER = Path(__file__).parent.parent / "examples" / "scaling"
NAMES = ("plan", "correlation", "records", "report", "classifier", "training", "run")


@pytest.fixture(scope="module")
def scaling():
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    patch.syspath_prepend(FOLDER)
    torch.set_num_threads(1)
    yield SimpleNamespace(**{name: import_module(name) for name in NAMES})
    patch.undo()
    torch.set_num_threads(threads)
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(scaling, monkeypatch):
    """A study of three runs, which takes seconds."""
    monkeypatch.setattr(scaling.plan, "CONFIGS", ["S/8", "S/4", "L/8"])
    few = {"seeds": 1, "steps": 5, "warmup": 2, "batch": 8, "samples": 40, "sampling_steps": 2}
    return replace(scaling.plan.Settings(), **few, reference=200, classifier_steps=5)


def test_spearman_equals_scipys(scaling):
    stats = pytest.importorskip("scipy.stats")
    random = torch.Generator().manual_seed(0)
    for n in (3, 9, 20):
        x, y = torch.randint(6, (2, n), generator=random).double().numpy()  # with ties
        assert scaling.correlation.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_spearman_by_hand(scaling):
    spearman = scaling.correlation.spearman
    assert spearman([1, 2, 3], [5, 70, 900]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 1, 2]) == pytest.approx(-0.8)  # 1 - 6 (9 + 1 + 4 + 4) / (4 * 15)
    assert list(scaling.correlation.ranks([7, 3, 7, 1])) == [3.5, 2, 3.5, 1]


def test_interval(scaling):
    interval = scaling.correlation.interval
    x = list(range(9))
    clear = [[100 - 10 * i, 101 - 10 * i, 99 - 10 * i] for i in x]
    assert interval(x, clear, models=False) == pytest.approx((-1, -1))
    assert interval(x, clear, models=True) == pytest.approx((-1, -1))
    noise = [[y, y + 1, y - 1] for y in (4, 0, 8, 2, 6, 1, 7, 5, 3)]
    low, high = interval(x, noise, models=True)
    assert low < 0 < high and high - low > 0.8
    close = [[100 - 10 * i, 100 - 10 * i + 60, 100 - 10 * i - 60] for i in x]  # the seeds determine the order
    low, high = interval(x, close, models=False)
    assert -1 <= low < high < -0.1
    assert interval(x, noise, models=True) == interval(x, noise, models=True)


def test_plan_covers_sizes_and_costs(scaling):
    plan = scaling.plan
    costs = [plan.gmacs(config) for config in plan.SCALING]
    assert len(set(costs)) == len(plan.SCALING) >= 8
    assert max(costs) / min(costs) >= 100
    assert plan.Settings().seeds >= 3
    assert {plan.build_model(config).conditioning for config in plan.SCALING} == {"adaln_zero"}
    kinds = {plan.build_model(config).conditioning for config in plan.CONFIGS if config.startswith(plan.MIDDLE)}
    assert kinds == {"adaln_zero", "adaln", "cross_attention", "in_context"}


def test_runs_are_seed_after_seed(scaling):
    runs = scaling.plan.runs(scaling.plan.Settings(seeds=2))
    assert len(set(runs)) == len(runs) == 2 * len(scaling.plan.CONFIGS)
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    assert runs[0].config == "L/2" and runs[len(runs) // 2 - 1].config == "S/8"


def test_training_lowers_the_loss_and_repeats(scaling, tiny):
    settings, run = replace(tiny, steps=80, batch=16, warmup=10, ema=0.9, samples=100), scaling.plan.Run("S/4", 1)
    average, loss = scaling.training.train(run, settings)
    again, same = scaling.training.train(run, settings)
    other, _ = scaling.training.train(scaling.plan.Run("S/4", 2), settings)
    start, _ = scaling.training.train(run, replace(settings, steps=1))
    assert loss == same and all(map(torch.equal, average.parameters(), again.parameters()))
    assert not torch.equal(average.x_embedder.proj.weight, other.x_embedder.proj.weight)
    fresh = [scaling.training.fresh_loss(model, settings) for model in (start, average)]
    blank = Glyphs().batch(range(100), 0)[0].square().mean().item()
    assert fresh[1] < 0.5 * fresh[0] and fresh[0] == pytest.approx(blank, rel=0.1)  # the output starts at zero
    x, y = scaling.training.sample(average, 0, replace(tiny, samples=60))
    assert x.shape == (60, 1, 16, 16) and x.abs().max() <= 1 and torch.equal(y.bincount(), torch.full((20,), 3))


def test_every_seed_has_its_own_glyphs(scaling, tiny, monkeypatch):
    read, batch = [], Glyphs.batch
    monkeypatch.setattr(Glyphs, "batch", lambda self, i, seed: read.append((seed, *i)) or batch(self, i, seed))
    for seed in (0, 1):
        scaling.training.train(scaling.plan.Run("S/8", seed), replace(tiny, steps=2))
    assert read == [(seed, *range(start, start + 8)) for seed in (0, 1) for start in (0, 8)]


def one_process(workers, context, prepare, shared):
    prepare(*shared)
    return ThreadPoolExecutor(workers)


def test_study_resumes_after_a_stop(scaling, tiny, tmp_path, monkeypatch):
    path = tmp_path / "results" / "runs.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(scaling.run, "ProcessPoolExecutor", one_process)
        scaling.run.study(scaling.records.Records(path), tiny, workers=1)
    done = scaling.records.Records(path)
    assert [run["config"] for run in done.runs] == ["L/8", "S/4", "S/8"]
    setup, first, second, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(setup + first + last + second[:20])  # as after a power failure
    scaling.run.study(scaling.records.Records(path), tiny, workers=1)
    assert path.read_bytes().startswith(setup + first + last)
    again = scaling.records.Records(path)
    assert [run["config"] for run in again.runs] == ["L/8", "S/8", "S/4"]
    assert [run["session"] for run in again.runs] == [1, 1, 2]
    # from another process, whose memory alignment may change BLAS's rounding
    assert again.runs_of("S/4")[0]["fid"] == pytest.approx(done.runs_of("S/4")[0]["fid"], rel=1e-6)
    assert again.seconds() == pytest.approx(again.runs[1]["elapsed"] + again.runs[2]["elapsed"])
    with pytest.raises(SystemExit, match="settings"):
        again.begin({**again.setup, "settings": {"steps": 6}})
    scaling.report.write_report(again, tmp_path, readme=None)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["runs"] == 3 and summary["models"]["S/4"]["fid"] == again.runs_of("S/4")[0]["fid"]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--workers", "0"], "--workers must be at least 1, got 0"),
        (["--steps", "-3", "--out", "new"], "--steps must be at least 1, got -3"),
        (["--predict-noise"], "need --out"),
        (["--models", "M/3", "--out", "new"], "invalid choice: 'M/3'"),
        (["--plot", "--out", "none"], "no finished run"),
    ],
)
def test_bad_arguments(scaling, arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        scaling.run.main(arguments)
    assert message in capsys.readouterr().err + str(stop.value)


@pytest.fixture(scope="module")
def results(scaling):
    return scaling.records.Records(FOLDER / "results" / "runs.jsonl")


def test_every_run_of_the_plan_is_in_the_results(scaling, results):
    settings = scaling.plan.Settings(**results.setup["settings"])
    assert settings == scaling.plan.Settings()
    assert sorted((run["config"], run["seed"]) for run in results.runs) == sorted(scaling.plan.runs(settings))
    assert results.setup["machine"]["cpu"] and results.setup["machine"]["torch"] and results.setup["command"]
    assert results.setup["classifier_accuracy"] > 0.99
    for run in results.runs:
        assert run["gmacs"] == scaling.plan.gmacs(run["config"])
        assert results.setup["floor_fid"] < run["fid"] < results.setup["noise_fid"]


def test_readme_shows_the_results(scaling, results):
    summary = json.loads((FOLDER / "results" / "summary.json").read_text(encoding="utf-8"))
    found = json.loads(json.dumps(scaling.report.summary(results)))
    assert math.isclose(found["spearman"], summary["spearman"], abs_tol=1e-12)
    assert found["models"].keys() == summary["models"].keys()
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    others = scaling.report.other_studies(FOLDER / "results")
    assert scaling.report.table(found, others) in readme and scaling.report.table(summary, others) in readme
    assert others and all(other["classifier"] == found["classifier"] for other in others)  # one kind of FID
    assert "](results/scaling.png)" in readme and (FOLDER / "results" / "scaling.png").stat().st_size > 10_000
