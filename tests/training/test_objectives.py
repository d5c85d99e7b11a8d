"""Runs that train flows and average velocities: recorded, resumed, on two ranks, rejected if options conflict."""

import json

import pytest
import torch

from ditfast import DiT, sample
from ditfast.data import open_data
from ditfast.data.stream import stream_batches
from ditfast.training.checkpoint import checkpoint_at
from ditfast.training.config import Config, fill_defaults
from ditfast.training.manifest import ABOUT, write_about
from ditfast.training.objective import make_objective
from ditfast.training.step_draws import draw_step

FLOW = ("--objective", "flow", "--path-type", "GVP", "--prediction", "noise")
MEAN = ("--objective", "meanflow", "--interval-ratio", 0.5)
SAMPLING = {
    FLOW: {"objective": "flow", "path_type": "GVP", "prediction": "noise"},
    MEAN: {"objective": "meanflow"},
}
objectives = pytest.mark.parametrize("flags", [FLOW, MEAN], ids=["flow", "meanflow"])


@objectives
def test_a_run(kit, refused, flags):
    """It resumes bit for bit, shows samples along the way, and leaves a model that records how to sample from it."""
    grids = ("--sample-every", 3)
    whole = kit.train("whole", *flags, *grids)
    kit.train("parts", *flags, "--steps", 3)
    assert f"--objective must be {flags[1]} to resume " in refused("--resume", kit.folder / "parts")
    kit.train("parts", *flags, "--steps", 6, "--resume", "auto", *grids)
    assert kit.losses(kit.folder / "parts") == kit.losses(whole)
    weights = [(kit.folder / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]
    assert (whole / "samples" / "step-00000006.png").exists()
    model = DiT.from_pretrained(whole / "model")
    assert model.sampling.items() >= SAMPLING[flags].items() and "noise_schedule" not in model.sampling
    assert model.config["second_time"] == (flags is MEAN)
    out = kit.folder / "samples"
    steps = () if flags is MEAN else ("--steps", "3")
    sample.main(["--ckpt", str(whole / "model"), "--classes", "1", "2", *steps, "--out", str(out)])
    assert json.loads((out / "settings.json").read_text())["sampler"] == ("one-step" if flags is MEAN else "euler")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "pure_bf16"])
def test_the_loss_matches_the_objective(kit, precision):
    """The first step's loss, from its draws; for average velocities, the unweighted error is shown."""
    run = kit.train("run", *MEAN, "--steps", 1, "--precision", precision, "--label-drop", 0)
    config = fill_defaults(Config(objective="meanflow", interval_ratio=0.5), "cpu")
    objective = make_objective(config, 10)
    drawn = draw_step(0, 0, 6, (1, 8, 8), objective.draw_times, 0.0, "cpu")
    t, r = drawn.times
    assert (t <= r).all() and len(t) == 6 and (t < r).any() and (t == r).any()
    # a new model predicts 0 everywhere, which leaves the velocity, data - noise
    batches = stream_batches(open_data("digits", None), seed=0, start=0, batch=6, rank=0, world=1, workers=0)
    x1 = next(batches).x
    expected = (x1 - drawn.noise).square().mean().item()
    assert kit.losses(run)[0][1] == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks_equal_one(kit, parallel):
    options = (*MEAN, "--target-cfg", 2, "--target-mix", 0.25, "--steps", 3, "--accumulate", 1)
    one = kit.train("one", *options)
    two = kit.run("two", *options, "--parallel", parallel, "--sample-every", 3, world=2)
    for found, right in zip(kit.losses(two), kit.losses(one), strict=True):
        assert found == pytest.approx(right, rel=1e-4)
    ours, other = (DiT.from_pretrained(run / "model").state_dict() for run in (one, two))
    for name, value in ours.items():
        torch.testing.assert_close(other[name], value, rtol=0.1, atol=2e-3)


def test_execution_options_do_not_change_the_result(kit):
    plain = kit.losses(kit.train("plain", *MEAN, "--steps", 3))
    for name, options in {"passes": ("--accumulate", 3), "again": ("--checkpointing", "full")}.items():
        got = kit.losses(kit.train(name, *MEAN, "--steps", 3, *options))
        assert got == [pytest.approx(line, rel=1e-4) for line in plain]


def test_defaults_match_the_objective():
    flow, mean = (fill_defaults(Config(objective=name), "cpu") for name in ("flow", "meanflow"))
    assert (flow.path_type, flow.prediction, flow.time_sampling, flow.cfg) == ("Linear", "velocity", "uniform", 4.0)
    assert (mean.time_sampling, mean.time_mean, mean.sample_steps, mean.cfg) == ("logit-normal", 0.4, 1, 1.0)
    assert flow.noise_schedule is mean.noise_schedule is mean.path_type is None
    assert [make_objective(each, 10).shown for each in (flow, mean)] == ["loss", "mse"]


@pytest.mark.parametrize(
    "flags, said",
    [
        (("--path-type", "GVP"), "--path-type is for --objective flow, got --objective diffusion"),
        (("--objective", "flow", "--noise-schedule", "linear"), "--noise-schedule is for --objective diffusion, got"),
        (("--objective", "flow", "--interval-ratio", 0.5), "--interval-ratio is for --objective meanflow, got"),
        (
            ("--objective", "flow", "--loss-weight", "likelihood"),
            "--loss-weight likelihood is for --prediction noise or",
        ),
        ((*MEAN, "--prediction", "noise"), "--prediction is for --objective flow, got --objective meanflow"),
        (("--objective", "meanflow", "--interval-ratio", 2), "--interval-ratio must be in [0, 1], got 2.0"),
        (("--objective", "meanflow", "--target-mix", 1), "--target-mix must be in [0, 0.999], got 1.0"),
        (("--objective", "meanflow", "--target-cfg", -1), "--target-cfg must be at least 0, got -1.0"),
        (("--objective", "flow", "--time-std", -1), "--time-std must be in [0, 100], got -1.0"),
        ((*MEAN, "--target-cfg", 2, "--label-drop", 0), "--target-cfg 2 needs a null label"),
    ],
)
def test_refused(kit, refused, flags, said):
    assert said in refused(*flags)
    assert not (kit.folder / "refused").exists()


def test_guidance_in_the_target_is_recorded(kit, refused):
    """By its effective scale; a checkpoint of before that records none goes on."""
    guided = (*MEAN, "--target-cfg", 0.2, "--target-mix", 0.92, "--steps", 1)
    out = kit.train("guided", *guided)
    assert DiT.from_pretrained(out / "model").sampling["guidance"] == 2.5
    again = ("--resume", "auto", "--steps", 2)
    assert "sampling's guidance was 2.5, is 2.0" in refused(
        *guided, "--target-mix", 0.9, "--resume", out / "checkpoints" / "step-00000001"
    )
    assert "--cfg must be 1 for a model that learns to guide itself, by 2.5, got 3" in refused(
        *guided, "--cfg", 3, "--sample-every", 1
    )
    about = checkpoint_at(out) / ABOUT
    content = json.loads(about.read_text())
    assert content["sampling"].pop("guidance") and content.pop("checksum")
    write_about(about.parent, content)
    kit.train("guided", *guided, *again)
    assert DiT.from_pretrained(out / "model").sampling["guidance"] == 2.5


@pytest.mark.slow
def test_compiled(kit):
    """The whole step, because compiled parts do not support tangents."""
    options = (*MEAN, "--backend", "reference", "--steps", 3)
    for found, right in zip(
        kit.losses(kit.train("compiled", *options, "--compile")),
        kit.losses(kit.train("plain", *options)),
        strict=True,
    ):
        assert found == pytest.approx(right, rel=1e-4)


def test_a_run_inherits_its_inits_objective(kit, refused):
    first = kit.train("first", *FLOW, "--steps", 1)
    second = kit.bare("second", "--init", first / "model", "--steps", 1)
    assert DiT.from_pretrained(second / "model").sampling == DiT.from_pretrained(first / "model").sampling
    told = refused("--init", first / "model", "--objective", "meanflow")
    assert "has no second time, got --objective meanflow" in told
