"""Bad input: one error that names the argument, the rule and the value."""

import builtins

import pytest
import torch

from ditfast import DiT
from ditfast.flow import MeanFlow, Sampler, create_transport
from ditfast.flow.schedulers import make_scheduler, sample_with_scheduler

X, T = torch.zeros(2, 3, 4, 4), torch.tensor([0.2, 0.9])


def model(x, t, r=None, y=None):
    return x


@pytest.mark.parametrize(
    "options, message",
    [
        ({"path_type": []}, r"path_type must be one of Linear, GVP, VP, got \[\]"),
        ({"path_type": "linear"}, "path_type must be one of Linear, GVP, VP, got 'linear'; did you mean 'Linear'"),
        ({"prediction": "velocty"}, "prediction must be one of velocity, .*; did you mean 'velocity'"),
        ({"loss_weight": "likelyhood"}, "loss_weight must be one of None, velocity, .*; did you mean 'likelihood'"),
        ({"train_eps": -0.1}, r"train_eps must be in \[0, 0.499\], got -0.1"),
        ({"sample_eps": 0.5}, r"sample_eps must be in \[0, 0.499\], got 0.5"),
        ({"path_type": "VP", "train_eps": 0}, r"train_eps must be in \[1e-09, 0.499\], got 0"),
        ({"prediction": "noise", "sample_eps": 0.0}, r"sample_eps must be in \[1e-09, 0.499\], got 0.0"),
        ({"time_sampling": "normal"}, "time_sampling must be one of uniform, logit-normal, got 'normal'"),
        ({"time_std": -1}, r"time_std must be in \[0, 100\], got -1"),
        ({"time_mean": "0"}, r"time_mean must be in \[-100, 100\], got '0'"),
        ({"time_shift": 0}, r"time_shift must be in \[0.001, 1000\], got 0"),
    ],
)
def test_transports(options, message):
    with pytest.raises(ValueError, match=message):
        create_transport(**options)


LOSSES = {"transport": create_transport().training_losses, "mean flow": MeanFlow().training_losses}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"x1": X.long()}, TypeError, "x1 must be floating-point, got torch.int64"),
        ({"noise": X[:1]}, ValueError, r"noise must have the shape of x1, \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
        ({"t": T[:1]}, ValueError, r"t must have shape \(B,\) = \(2,\), got \(1,\)"),
        ({"t": T.long()}, TypeError, "t must be floating-point, got torch.int64"),
        ({"t": 0.5}, TypeError, "t must be a tensor, got float"),
        ({"t": T.to("meta")}, ValueError, "t must be on the device of x1, cpu, got meta"),
        ({"t": T + 0.2}, ValueError, r"t must be in \[0, 1\], got values from 0.4 to 1.1"),
        ({"t": T - 0.3}, ValueError, r"t must be in \[0, 1\], got values from -0.1 to 0.6"),
        ({"t": T * torch.nan}, ValueError, r"t must be in \[0, 1\], got values from nan to nan"),
        ({"model": lambda *a, **k: None}, TypeError, "the model must return a tensor, got NoneType"),
        ({"model": lambda x, t, r=None: x[:, :2]}, ValueError, r"or twice its channels: .* got \(2, 2, 4, 4\)"),
    ],
)
def test_losses(name, options, error, message):
    arguments = {"model": model, "x1": X, "t": T, **options}
    with pytest.raises(error, match=message):
        LOSSES[name](arguments.pop("model"), arguments.pop("x1"), **arguments)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"t": T, "r": torch.tensor([0.3, 0.8])}, "r must be at or after t, .*: got r=0.8 for t=0.9"),
        ({"t": T, "r": T + 0.2}, r"r must be in \[0, 1\], got values from 0.4 to 1.1"),
        ({"r": T}, "t must be given if r is, got None"),
    ],
)
def test_stretches_of_time(options, message):
    with pytest.raises(ValueError, match=message):
        MeanFlow().training_losses(model, X, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interval_ratio": 1.5}, r"interval_ratio must be in \[0, 1\], got 1.5"),
        ({"adaptive_power": -1}, r"adaptive_power must be in \[0, 10\], got -1"),
        ({"adaptive_eps": 0}, "adaptive_eps must be at least 1e-12, got 0"),
        ({"guidance": 2}, "null_label must be given for guidance=2, got None"),
        ({"guidance_mix": 1.0}, r"guidance_mix must be in \[0, 0.999\], got 1.0"),
        ({"guidance_interval": (0.5, 0.2)}, r"guidance_interval must be in \[0.5, 1\], got 0.2"),
    ],
)
def test_mean_flows(options, message):
    with pytest.raises(ValueError, match=message):
        MeanFlow(**options)


ODE, SDE = Sampler(create_transport()).sample_ode, Sampler(create_transport()).sample_sde


@pytest.mark.parametrize(
    "sampler, options, message",
    [
        (ODE, {"sampling_method": "Euler"}, "sampling_method must be one of euler, .*; did you mean 'euler'"),
        (ODE, {"num_steps": 1}, r"num_steps must be an integer in \[2, 1000000\], got 1"),
        (ODE, {"num_steps": 2.5}, r"num_steps must be an integer in \[2, 1000000\], got 2.5"),
        (ODE, {"atol": -1}, "atol must be at least 0, got -1"),
        (ODE, {"time_shift": 0}, r"time_shift must be in \[0.001, 1000\], got 0"),
        (SDE, {"sampling_method": "euler"}, "sampling_method must be one of Euler, Heun, got 'euler'"),
        (SDE, {"diffusion_form": "sigm"}, "diffusion_form must be one of constant, .*; did you mean 'sigma'"),
        (SDE, {"diffusion_norm": -1}, "diffusion_norm must be at least 0, got -1"),
        (SDE, {"last_step": "mean"}, "last_step must be one of None, Mean, .*; did you mean 'Mean'"),
        (SDE, {"last_step_size": 1.0}, r"last_step_size must be in \[1e-06, 0.998\], got 1.0"),
        (SDE, {"num_steps": 2}, r"num_steps must be an integer in \[3, 1000000\], got 2"),
    ],
)
def test_samplers(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(**options)


@pytest.mark.parametrize("sampler", [ODE(sampling_method="euler"), SDE()])
def test_invalid_starts_and_outputs_of_samplers(sampler):
    with pytest.raises(TypeError, match="init must be floating-point, got torch.int64"):
        sampler(X.long(), model)
    with pytest.raises(ValueError, match="the model's output must have the shape of x"):
        sampler(X, lambda x, t: x[:1])


def test_steps_of_a_mean_flow():
    with pytest.raises(ValueError, match=r"steps must be an integer in \[1, 1000000\], got 0"):
        MeanFlow().sample(model, X, steps=0)


def test_schedulers():
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="scheduler must be one of flow-euler, .*; did you mean 'flow-heun'"):
        make_scheduler("flow-heu")
    with pytest.raises(ValueError, match="scheduler must be a flow scheduler of diffusers, got DDIMScheduler"):
        sample_with_scheduler(model, diffusers.DDIMScheduler(), X.shape, 5, X)
    with pytest.raises(ValueError, match=r"steps must be an integer in \[1, 1000000\], got 0"):
        sample_with_scheduler(model, make_scheduler("flow-euler"), X.shape, 0, X)


def test_without_torchdiffeq(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "torchdiffeq":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    ODE(sampling_method="heun2")
    for make in (ODE, Sampler(create_transport()).sample_ode_likelihood):
        with pytest.raises(ImportError, match=r"'dopri5' needs torchdiffeq: pip install 'ditfast\[flow\]'"):
            make()


def test_mean_flow_rejects_a_model_that_drops_labels():
    model = DiT(
        input_size=4,
        patch_size=2,
        in_channels=2,
        hidden_size=24,
        depth=1,
        num_heads=2,
        second_time=True,
        learn_sigma=False,
    )
    x1, y = torch.randn(3, 2, 4, 4), torch.tensor([0, 1, 2])
    mean_flow = MeanFlow(guidance=2.0, null_label=1000)
    with pytest.raises(ValueError, match=r"call model.eval\(\).* got dropout_prob=0.1 in training mode"):
        mean_flow.training_losses(model.train(), x1, {"y": y})
    with pytest.raises(ValueError, match=r"model_kwargs must have y, labels, for guidance=2, got \[\]"):
        mean_flow.training_losses(model.eval(), x1)
    assert mean_flow.training_losses(model, x1, {"y": y})["loss"].shape == (3,)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("make", [lambda v: torch.nested.nested_tensor([*v]), torch.Tensor.to_sparse])
def test_no_dense_tensor(make):
    flow, mean = create_transport(), MeanFlow()
    for name, call in (
        ("x1", lambda: flow.training_losses(model, make(X))),
        ("noise", lambda: flow.training_losses(model, X, noise=make(X))),
        ("t", lambda: flow.training_losses(model, X, t=make(T))),
        ("x1", lambda: mean.training_losses(model, make(X))),
        ("init", lambda: Sampler(flow).sample_ode(sampling_method="euler", num_steps=3)(make(X), model)),
        ("init", lambda: Sampler(flow).sample_sde(num_steps=3)(make(X), model)),
    ):
        with pytest.raises(TypeError, match=f"^{name} must be a dense tensor, torch.strided, got "):
            call()
