"""`--demo`, also in one step, draws digits that a judge classifies as requested, and that are not copies."""

import functools
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ditfast import DiT
from ditfast.flow import MeanFlow
from ditfast.sample import main
from ditfast.sampling.demo import DEMO, ONE_STEP, load_demo
from ditfast.sampling.sampler import SAMPLERS

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "digits.py"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Run the demo with more options, in its own folder, as from a shell."""
    monkeypatch.chdir(tmp_path)

    def command(*options):
        monkeypatch.setattr(sys, "argv", ["sample", "--demo", *map(str, options)])
        main()

    return command


def images(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(Path(folder).glob("*.png"))])


def times(folder) -> dict:
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).glob("*.png")}


def test_the_demo_needs_no_other_option_and_may_be_run_twice(demo, tmp_path, capsys):
    demo()
    drawn = images("demo")
    assert drawn.shape == (60, 8, 8, 3)
    grid = np.asarray(Image.open("demo.png"))  # a column for each class, 2 pixels between, all enlarged
    assert grid.shape == (8 * (6 * 10 - 2), 8 * (10 * 10 - 2), 3)
    for i in (0, 37, 59):
        top, left = i // 10 * 80, i % 10 * 80
        np.testing.assert_array_equal(grid[top : top + 64, left : left + 64], np.kron(drawn[i], np.ones((8, 8, 1))))
        assert not grid[top : top + 64, left + 64 : left + 80].any()
        assert Image.open(f"demo/{i:06d}.png").text["Description"].startswith(f"class {i % 10},")
    before, said = times("demo"), capsys.readouterr().out
    assert said.splitlines() == ["60 images in demo", "demo.png"]
    demo()
    assert times("demo") == before and capsys.readouterr().out == said
    np.testing.assert_array_equal(np.asarray(Image.open("demo.png")), grid)
    assert {path.name for path in tmp_path.iterdir()} == {"demo", "demo.png"}


def test_the_demo_in_one_step(demo, tmp_path, capsys):
    demo("--one-step")
    assert images("demo-one-step").shape == (60, 8, 8, 3) and Path("demo-one-step.png").exists()
    found = json.loads(Path("demo-one-step/settings.json").read_text())
    assert found["sampler"] == "one-step" and found["steps"] == 1 and found["guidance"] is None
    demo("--one-s", "--sampler", "average", "--steps", 2, "--out", "two", "--grid", "two.png", "--classes", 4)
    assert json.loads(Path("two/settings.json").read_text())["objective"] == "meanflow"
    with pytest.raises(SystemExit, match="--steps must be 1 for one-step, got 4"):
        demo("--one-step", "--steps", 4)
    with pytest.raises(SystemExit, match="2"):
        main(["--one-step", "--ckpt", ONE_STEP["ckpt"], "--num-samples", "1"])
    assert "--one-step needs --demo" in capsys.readouterr().err


def test_nothing_is_overwritten_unless_requested(demo, capsys):
    short = ("--classes", 3, 8, "--steps", 2)
    demo(*short)
    before = times(".") | times("demo")
    with pytest.raises(
        SystemExit, match=r"--out demo holds .*: choose another --out, or start over with --overwrite"
    ):
        demo(*short, "--seed", 7)
    with pytest.raises(SystemExit, match=r"--out demo holds images from another run \(guidance was .*--overwrite"):
        demo(*short, "--cfg", 1)
    with pytest.raises(SystemExit, match=r"--grid demo.png exists .*: choose another --grid, or .* --overwrite"):
        demo(*short, "--grid-scale", 4)
    assert times(".") | times("demo") == before
    demo(*short, "--cfg", 1, "--overwrite")
    assert times("demo").keys() == {"000000.png", "000001.png"}
    assert times(".") != {name: before[name] for name in times(".")}
    now = times(".")["demo.png"]
    demo(*short, "--seed", 7, "--out", "other")  # the grid goes by the folder's name
    assert times(".").keys() == {"demo.png", "other.png"} and times(".")["demo.png"] == now


def test_every_option_can_still_be_given(demo, save, tmp_path):
    demo("--num-samples", 3, "--steps", 2, "--sampler", "ddpm", "--out", "drawn", "--grid", "g.png", "--seed", 5)
    found = json.loads(Path("drawn/settings.json").read_text())
    assert found["classes"] is None and found["seeds"] == "5 + i" and found["sampler"] == "ddpm"
    assert found["noise_schedule"] == "squaredcos_cap_v2" and found["steps"] == 2
    assert Image.open("g.png").size == (8 * 28, 8 * 8)
    layout = ("--grid-columns", 2, "--grid-scale", 1)
    demo("--ckpt", save(tmp_path / "mine"), "--classes", 6, 6, 6, "--steps", 2, *layout)
    assert Image.open("demo.png").size == (18, 18) and len(images("demo")) == 3


@pytest.mark.parametrize("option", ["--grid-columns", "--grid-scale"])
def test_a_grid_needs_columns_and_pixels(demo, option, capsys, tmp_path):
    with pytest.raises(SystemExit):
        demo(option, 0)
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"{option} must be at least 1, got 0")
    assert not list(tmp_path.iterdir())


def test_the_noise_schedule_reaches_the_samplers(demo):
    for sampler in ("ddim", "dpm++"):
        for schedule in ("linear", "squaredcos_cap_v2"):
            names = ("--out", f"{sampler}-{schedule}", "--grid", f"{sampler}-{schedule}.png")
            options = ("--sampler", sampler, "--noise-schedule", schedule, "--steps", 5, "--classes", 1, 2)
            demo(*options, "--allow-mismatch", *names)
        linear, cosine = (images(f"{sampler}-{schedule}") for schedule in ("linear", "squaredcos_cap_v2"))
        assert np.abs(linear.astype(int) - cosine).mean() > 10


@pytest.fixture(scope="module")
def example():
    """examples/digits.py as a module."""
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("examples_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def draw(tmp_path_factory):
    """Samples of the demo, one per label, (n, 64) in [-1, 1]."""

    def drawn(labels, *options):
        out = tmp_path_factory.mktemp("digits") / "out"
        main(
            ["--demo", "--classes", *map(str, labels), "--out", str(out), "--grid", f"{out}.png", *map(str, options)]
        )
        grey = torch.tensor(images(out)[..., 0], dtype=torch.float32)
        return grey.flatten(1) / 127.5 - 1

    return drawn


@pytest.fixture(scope="module")
def sampled(draw):
    """200 samples at the demo's settings, 20 of each class, and their labels (200,)."""
    labels = [*range(10)] * 20
    return draw(labels), torch.tensor(labels)


@pytest.fixture(scope="module")
def judge(example):
    """Trained only on held-out digits; right about the others, which the model was trained on."""
    from sklearn.svm import SVC

    held_out, labels = example.digits(held_out=True)
    judge = SVC(C=10).fit(held_out.flatten(1), labels)
    images, truth = example.digits()
    assert (judge.predict(images.flatten(1)) == truth.numpy()).mean() > 0.96
    return judge


@pytest.fixture(scope="module")
def sampled_in_one_step(draw):
    """600 samples from one call of the model, 60 of each class, and their labels (600,)."""
    labels = [*range(10)] * 60
    return draw(labels, "--one-step"), torch.tensor(labels)


@pytest.fixture(params=["sampled", "sampled_in_one_step"])
def both(request):
    """Samples and their labels, from either demo."""
    return request.getfixturevalue(request.param)


def test_samples_are_of_the_requested_class(judge, both):
    samples, asked = both
    right = judge.predict(samples) == asked.numpy()
    assert right.mean() >= 0.95
    assert right.reshape(-1, 10).mean(0).min() >= 0.8  # no class is lost


def test_one_step_takes_no_time():
    model, noise = load_demo(one_step=True), torch.randn(1, 1, 8, 8)

    def seconds():
        begin = time.perf_counter()
        MeanFlow().sample(model, noise, torch.tensor([3]))
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.25


@pytest.fixture(scope="module")
def of_ddim(draw):
    return functools.cache(lambda each, steps: draw([*range(10)] * each, "--sampler", "ddim", "--steps", steps))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")  # from its use of numpy
@pytest.mark.parametrize("each, steps", [(2, 8), pytest.param(20, 25, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "ddim"])
def test_every_sampler_is_as_legible_as_ddim(judge, draw, of_ddim, name, each, steps):
    labels = [*range(10)] * each
    found, expected = draw(labels, "--sampler", name, "--steps", steps), of_ddim(each, steps)
    right, of_ddim_right = ((judge.predict(x) == labels).mean() for x in (found, expected))
    assert right >= 0.95 * of_ddim_right > 0.9
    # the judge also reads black and white pixels, which samples outside the data's range become
    grey, of_ddim_grey = ((x.abs() < 1).float().mean() for x in (found, expected))
    assert grey > 0.7 * of_ddim_grey


def nearest(images, others):
    """The distance (n,) of each image (n, 64) to the nearest of ``others``."""
    return torch.cdist(images, others).min(dim=1).values


def test_samples_are_not_copies(example, both):
    """Training images are as far from samples as from held-out digits, which are not copies, either."""
    known, held_out = (example.digits(held_out=which)[0].flatten(1) for which in (False, True))
    shares = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    expected = nearest(held_out, known).quantile(shares)

    def ratios(samples):
        return nearest(samples, known).quantile(shares) / expected

    found = ratios(both[0])
    assert ((found > 0.8) & (found < 1.25)).all(), found
    half_copied = torch.cat([both[0][:100], known[:100] + 0.02])
    assert ratios(half_copied).min() < 0.5  # this measure would detect copies


@pytest.mark.parametrize("name, least", [("sampled", 0.75), ("sampled_in_one_step", 0.6)])  # ones differ least
def test_samples_of_a_class_differ(example, request, name, least):
    """As much as held-out digits of the same class, or not much less."""
    (samples, asked), (images, labels) = request.getfixturevalue(name), example.digits(held_out=True)
    for k in range(10):
        own, real = (torch.pdist(x.flatten(1)[y == k]) for x, y in ((samples, asked), (images, labels)))
        assert own.median() > least * real.median() and own.min() > 0.5 * real.min(), k


@pytest.mark.parametrize("demo", [DEMO, ONE_STEP])
def test_the_checkpoint_is_small(demo):
    files = {path.name: path.stat().st_size for path in Path(demo["ckpt"]).iterdir()}
    assert files.keys() == {"config.json", "model.safetensors", "README.md"}
    assert sum(files.values()) < 2e6


def test_the_example_makes_this_checkpoint(example, monkeypatch, capsys, tmp_path):
    def train(name, *options):
        monkeypatch.setattr(sys, "argv", ["digits.py", "--steps", "3", "--out", str(tmp_path / name), *options])
        example.main()
        return (tmp_path / name / "model.safetensors").read_bytes()

    weights = train("a")
    assert train("b") == weights and train("c", "--seed", "1") != weights
    for name, options, message in (
        ("a", (), "a exists"),
        ("d", ("--steps", "0"), "--steps must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            train(name, *options)
        assert message in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "d").exists()
    model, shipped = (DiT.from_pretrained(folder) for folder in (tmp_path / "a", DEMO["ckpt"]))
    assert model.config == shipped.config and model.sampling == shipped.sampling
    assert model.pos_embed.dtype == shipped.pos_embed.dtype == torch.float16
    assert torch.isfinite(model.final_layer.linear.weight).all() and model.final_layer.linear.weight.any()


@pytest.mark.slow
def test_compiled_steps_draw_the_same(demo):
    """Even in a last batch of another size."""
    demo("--batch", 32)
    demo("--batch", 32, "--compile", "--out", "compiled", "--grid", "compiled.png")
    drawn, compiled = images("demo").astype(int), images("compiled")
    assert drawn.std() > 50 and np.abs(drawn - compiled).mean() < 2
