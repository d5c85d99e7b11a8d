"""Flow models are sampled as they were trained: only what fits their objective is available."""

import gc
import json
import re
import sys

import numpy as np
import pytest
import torch
from tiny_models import save_dit

from ditfast import DiT
from ditfast.flow import MeanFlow, create_transport
from ditfast.flow import Sampler as Solver
from ditfast.sampling.decode import to_uint8
from ditfast.sampling.flow import FlowSampler
from ditfast.sampling.start import draw_start

TWO = ("--classes", 1, 2, "--cfg", 1)


def save_as(folder, objective, **sampling) -> str:
    """Save a model that records its training objective."""
    model = DiT.from_pretrained(save_dit(folder, second_time=objective == "meanflow"))
    model.sampling = {"objective": objective, **sampling}
    model.save_pretrained(folder, overwrite=True)
    return str(folder)


@pytest.fixture
def flow(tmp_path):
    return save_as(tmp_path / "flow", "flow", path_type="GVP", prediction="velocity")


@pytest.fixture
def mean(tmp_path):
    return save_as(tmp_path / "mean", "meanflow")


def expected(model, sample):
    """The expected result, from ditfast.flow alone, without guidance, for `TWO`."""
    starts = [draw_start(i, (3, 8, 8), 7, label=label) for i, label in enumerate((1, 2))]
    noise, y = torch.stack([each.noise for each in starts]), torch.tensor([1, 2])
    return to_uint8(sample(DiT.from_pretrained(model), noise, y, [each.generator for each in starts]))


def same(images, right):
    np.testing.assert_allclose(images.astype(int), right.astype(int), atol=1)


def test_euler_and_heun(run, flow):
    solver = Solver(create_transport("GVP"))
    for name, method in (("euler", "euler"), ("heun", "heun2")):
        images = run(*TWO, "--sampler", name, model=flow, out=name)
        ode = solver.sample_ode(sampling_method=method, num_steps=5)
        same(images, expected(flow, lambda m, noise, y, _, ode=ode: ode(noise, m, y=y)[-1]))


def test_the_sde(run, flow, tmp_path):
    form = {"diffusion_form": "sigma", "num_steps": 4, "last_step_size": 0.25}
    right = expected(
        flow, lambda m, x, y, own: Solver(create_transport("GVP")).sample_sde(**form, generator=own)(x, m, y=y)[-1]
    )
    same(run(*TWO, "--sampler", "sde", model=flow), right)
    alone = run("--classes", 2, "--seed", 1, "--cfg", 1, "--sampler", "sde", model=flow, out="alone")
    same(alone, right[1:])  # a sample's noise does not depend on its batch


def test_the_adaptive_ode_solves_each_sample_alone(run, flow):
    pytest.importorskip("torchdiffeq")
    ode = Solver(create_transport("GVP")).sample_ode()

    def each(model, noise, y, _):
        return torch.cat([ode(noise[i : i + 1], model, y=y[i : i + 1])[-1] for i in range(2)])

    same(run(*TWO, "--sampler", "ode", model=flow, steps=None), expected(flow, each))


@pytest.mark.parametrize(
    "name, options, steps",
    [
        ("ode", {"sampling_method": "rk4", "time_shift": 2.0}, 3),
        ("ode", {"sampling_method": "heun2"}, 3),
        ("ode", {"sampling_method": "bosh3", "atol": 1e-2, "rtol": 1e-1}, None),
        ("sde", {"sampling_method": "Heun", "diffusion_form": "decreasing", "diffusion_norm": 2.0}, 4),
        ("sde", {"diffusion_form": "SBDM", "last_step": "Tweedie", "last_step_size": 0.04}, 4),
        ("sde", {"last_step": None}, 4),
    ],
)
def test_options_of_the_solvers(run, flow, tmp_path, name, options, steps):
    """They mean what they mean in ditfast.flow."""
    pytest.importorskip("torchdiffeq")
    solver = Solver(create_transport("GVP"))

    def each(model, noise, y, own):
        if name == "sde":
            form = {"diffusion_form": "sigma", "last_step_size": 1 / steps, "num_steps": steps} | options
            return solver.sample_sde(**form, generator=own)(noise, model, y=y)[-1]
        ode = solver.sample_ode(**options, **({"num_steps": steps + 1} if steps else {}))
        return torch.cat([ode(noise[i : i + 1], model, y=y[i : i + 1])[-1] for i in range(2)])

    flags = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value or "none")]
    same(run(*TWO, "--sampler", name, *flags, model=flow, steps=steps), expected(flow, each))
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings.items() >= {key: value or "none" for key, value in options.items()}.items()


@pytest.mark.parametrize("steps", [1, 3])
def test_average_velocities(run, mean, steps, tmp_path):
    options = ("--sampler", "average") if steps > 1 else ()
    images = run("--classes", 1, 2, *options, model=mean, steps=steps if steps > 1 else None)
    same(images, expected(mean, lambda m, noise, y, _: MeanFlow().sample(m, noise, y, steps)))
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["objective"] == "meanflow" and settings["steps"] == steps and settings["guidance"] is None
    assert settings["sampler"] == ("average" if steps > 1 else "one-step")


def test_a_model_of_averages_also_has_the_velocity(run, mean):
    ode = Solver(create_transport()).sample_ode(sampling_method="euler", num_steps=5)
    same(run(*TWO, "--sampler", "euler", model=mean), expected(mean, lambda m, x, y, _: ode(x, m, y=y)[-1]))


@pytest.mark.parametrize("name", ["euler", "heun", "sde", "ode", "average"])
def test_guidance_where_it_is_requested(run, flow, mean, name):
    """Inside the interval of noise levels, even if the times are not known in advance."""
    shared = {"model": mean if name == "average" else flow, "steps": None if name == "ode" else 4}
    classes = ("--classes", 1, 2, "--sampler", name)
    plain, guided, part, none = (
        run(*classes, "--cfg", scale, "--cfg-interval", *interval, out=f"{scale}{interval}", **shared)
        for scale, interval in ((1, (0, 1)), (4, (0, 1)), (4, (0.3, 0.8)), (4, (0.999, 0.9999)))
    )
    same(none, plain)
    assert (guided != plain).any() and (part != plain).any() and (part != guided).any()


@pytest.mark.parametrize("name", ["flow-euler", "flow-dpm++"])
def test_schedulers_of_diffusers(run, refusal, flow, tmp_path, name):
    pytest.importorskip("diffusers")
    linear = save_as(tmp_path / "linear", "flow", path_type="Linear", prediction="velocity")
    near = run(*TWO, "--sampler", "heun", model=linear, steps=200, out="near")
    got = run(*TWO, "--sampler", name, "--cfg-interval", 0.2, 0.9, model=linear, steps=200)
    assert np.abs(got.astype(int) - near).mean() < 3
    assert "is for models of velocities on the Linear path" in refusal(*TWO, "--sampler", name, model=flow)


def test_time_shift(run, flow):
    plain, shifted = (run(*TWO, "--time-shift", s, model=flow, out=f"s{s}") for s in (1, 3))
    ode = Solver(create_transport("GVP")).sample_ode(sampling_method="euler", num_steps=5, time_shift=3.0)
    same(shifted, expected(flow, lambda m, x, y, _: ode(x, m, y=y)[-1]))
    assert (plain != shifted).any()


def test_a_file_of_weights_needs_the_objective(run, refusal, flow, tmp_path):
    model = DiT.from_pretrained(save_dit(tmp_path / "model"))
    bare = str(tmp_path / "bare.pt")
    torch.save(model.state_dict(), bare)
    heads, told = ("--num-heads", 2), ("--objective", "flow")
    assert "--sampler ode is for flows, but this is a diffusion model (--objective)" in refusal(
        *TWO, *heads, "--sampler", "ode", model=bare
    )
    ode = Solver(create_transport()).sample_ode(sampling_method="euler", num_steps=5)
    images = run(*TWO, *heads, *told, model=bare, out="told")
    same(images, expected(tmp_path / "model", lambda m, x, y, _: ode(x, m, y=y)[-1]))


@pytest.mark.parametrize(
    "options, message",
    [
        (("--objective", "diffusion"), "--objective must be 'flow', the model's training objective, got 'diffusion'"),
        (("--sampler", "ddim"), "--sampler must be one of euler, heun, ode, .* for a flow model, got 'ddim'"),
        (("--sampler", "one-step"), "--sampler must be one of euler, .* for a flow model, got 'one-step'"),
        (
            ("--sampler", "ode"),
            "--steps are for all samplers but ode with an adaptive method, got 4 for ode",
        ),
        (("--sampler", "sde", "--steps", 2), r"--steps must be in \[3, 999999\] for sde, got 2"),
        (("--noise-schedule", "linear"), "--noise-schedule is for diffusion, but this is a flow model"),
        (("--time-shift", 0), "--time-shift must be in .*, got 0"),
        (("--sampler", "ode", "--atol", "nan", "--steps"), "--atol must be at least 0, got nan"),
        (("--sampler", "ode", "--time-shift", 2), "--time-shift does not apply to ode"),
        (
            ("--sampler", "ode", "--sampling-method", "rk4", "--rtol", 0.1),
            "--rtol does not apply to ode with sampling_method rk4",
        ),
        (("--sampler", "ode", "--sampling-method", "rk"), "--sampling-method must be one of .*did you mean 'rk4'"),
        (("--sampler", "sde", "--time-shift", 2), "--time-shift does not apply to sde"),
        (("--diffusion-form", "sigma"), "--diffusion-form does not apply to euler"),
        (("--sampler", "sde", "--last-step-size", 2), "--last-step-size must be in .*, got 2"),
        (("--sampler", "sde", "--diffusion-norm", -1), "--diffusion-norm must be at least 0, got -1"),
        (("--sampler", "sde", "--last-step", "x"), "invalid choice: 'x'"),
    ],
)
def test_refused(refusal, flow, options, message):
    given, steps = (options[:-1], None) if options[-1] == "--steps" else (options, 4)
    assert re.search(message, refusal(*TWO, *given, model=flow, steps=steps))


def test_a_solver_that_is_not_installed(refusal, flow, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    message = refusal(*TWO, "--sampler", "ode", model=flow, steps=None)
    assert "--sampling-method 'dopri5' needs torchdiffeq: pip install 'ditfast[flow]'" in message


def test_rejected_for_other_models(refusal, ckpt, mean):
    assert "--steps must be 1 for one-step, got 4" in refusal(*TWO, "--sampler", "one-step", model=mean)
    assert "--time-shift is for flows" in refusal(*TWO, "--time-shift", 2, model=ckpt)
    assert "--last-step is for flows" in refusal(*TWO, "--last-step", "Mean", model=ckpt)
    assert "--time-shift does not apply to one-step" in refusal(*TWO, "--time-shift", 2, model=mean, steps=None)
    assert "--objective must be 'diffusion'" in refusal(*TWO, "--objective", "flow", model=ckpt)


def test_only_the_last_point_is_kept():
    """A loop of many steps holds two points, not all of them."""
    alive = []

    def model(x, t):
        gc.collect()
        alive.append(sum(torch.is_tensor(o) and o.shape == (1, 1, 77, 77) for o in gc.get_objects()))
        return x

    sampler = FlowSampler("euler", 12, {"objective": "flow", "path_type": "Linear", "prediction": "velocity"})
    sampler(model, torch.zeros(1, 1, 77, 77), None)
    assert max(alive) <= 4
