"""Bad input: one error that names the argument, the rule and the value."""

import pytest
import torch

from ditfast.diffusion import create_diffusion

X, T = torch.zeros(2, 3, 4, 4), torch.tensor([0, 9])
METHODS = ["q_sample", "q_mean_variance", "q_posterior_mean_variance", "p_mean_variance", "p_sample", "ddim_sample"]
METHODS += ["ddim_reverse_sample", "training_losses", "vb_terms_bpd", "predict_xstart_from_eps"]


def model(x, t):
    return torch.cat([x, x], dim=1)


def call(name, x=X, t=T, model=model, **options):
    method = getattr(create_diffusion("10"), name)
    if name.startswith("q_posterior"):
        return method(x, x, t)
    if name == "vb_terms_bpd":
        return method(model, x, x, t)
    if name.startswith("q_"):
        return method(x, t, **options)
    if name.startswith("predict"):
        return method(x, t, x)
    return method(model, x, t, **options)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "t, error, message",
    [
        (torch.tensor([0, 10]), IndexError, r"t must be in \[0, 9\], got values from 0 to 10"),
        (torch.tensor([-1, 9]), IndexError, r"t must be in \[0, 9\], got values from -1 to 9"),
        (torch.tensor([0.0, 1.0]), TypeError, "t must be int64 or int32, got torch.float32"),
        (torch.tensor([1]), ValueError, r"t must have shape \(B,\) = \(2,\), got \(1,\)"),
        (torch.tensor([[0], [9]]), ValueError, r"t must have shape \(B,\) = \(2,\), got \(2, 1\)"),
        (5, TypeError, "t must be a tensor, got int"),
        (T.to("meta"), ValueError, "t must be on the device of x, cpu, got meta"),
    ],
)
def test_timesteps(name, t, error, message):
    with pytest.raises(error, match=message):
        call(name, t=t)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "x, error, message",
    [
        (X.to(torch.uint8), TypeError, r"x\w* must be floating-point, got torch.uint8"),
        ([1.0], TypeError, r"x\w* must be a tensor, got list"),
        (torch.tensor(1.0), ValueError, r"x\w* must have shape \(B, …\), got \(\)"),
    ],
)
def test_samples(name, x, error, message):
    with pytest.raises(error, match=message):
        call(name, x=x)


@pytest.mark.parametrize("name", ["p_mean_variance", "p_sample", "ddim_sample", "training_losses", "vb_terms_bpd"])
def test_model_output(name):
    rule = "the model's output must have twice the channels of x, for learn_sigma=True"
    with pytest.raises(ValueError, match=rf"{rule}: \(2, 6, 4, 4\), got \(2, 3, 4, 4\)"):
        call(name, model=lambda x, t: x)
    with pytest.raises(TypeError, match="the model must return a tensor or a pair .*, got NoneType"):
        call(name, model=lambda x, t: None)


def test_model_output_without_variance():
    diffusion = create_diffusion("10", learn_sigma=False)
    rule = "the model's output must have the shape of x, for learn_sigma=False"
    with pytest.raises(ValueError, match=rf"{rule}: \(2, 3, 4, 4\), got \(2, 6, 4, 4\)"):
        diffusion.p_sample(model, X, T)


@pytest.mark.parametrize("name", ["q_sample", "training_losses"])
def test_noise(name):
    with pytest.raises(ValueError, match=r"noise must have the shape of x_start, \(2, 3, 4, 4\), got \(2, 3, 4\)"):
        call(name, noise=X[..., 0])
    with pytest.raises(ValueError, match="noise must be on the device of x_start, cpu, got meta"):
        call(name, noise=X.to("meta"))
    with pytest.raises(TypeError, match="noise must be floating-point, got torch.int64"):
        call(name, noise=X.long())


def test_posterior():
    with pytest.raises(ValueError, match=r"x_start must have the shape of x_t, \(2, 3, 4, 4\), got \(2, 1, 4, 4\)"):
        create_diffusion("10").q_posterior_mean_variance(X[:, :1], X, T)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_eta(eta):
    with pytest.raises(ValueError, match=rf"eta must be in \[0, 1\], got {eta}"):
        call("ddim_sample", eta=eta)
    with pytest.raises(ValueError, match=f"eta must be 0 for the deterministic reverse, got {eta}"):
        call("ddim_reverse_sample", eta=eta)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "device or noise must be given for a model without parameters"),
        ({"noise": X[:1]}, ValueError, r"noise must have the requested shape, \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
        ({"noise": X.long()}, TypeError, "noise must be floating-point, got torch.int64"),
        ({"noise": X, "device": "meta"}, ValueError, "noise must be on device=meta, got cpu"),
        (
            {"device": "cpu", "generator": [torch.Generator()]},
            ValueError,
            "one generator or one per sample, 2, got 1",
        ),
        ({"device": "cpu", "generator": 7}, TypeError, "generator must be a torch.Generator, .*, got int"),
        (
            {"device": "meta", "generator": torch.Generator()},
            ValueError,
            "generator must be on the device of the noise, meta, got cpu",
        ),
    ],
)
def test_loops(loop, options, error, message):
    with pytest.raises(error, match=message):
        getattr(create_diffusion("10"), loop)(model, X.shape, **options)


def test_bound():
    with pytest.raises(TypeError, match="x_start must be floating-point, got torch.uint8"):
        create_diffusion("10").calc_bpd_loop(model, X.to(torch.uint8))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("make", [lambda v: torch.nested.nested_tensor([*v]), torch.Tensor.to_sparse])
def test_no_dense_tensor(make):
    for name in METHODS:
        if name != "predict_xstart_from_eps":
            with pytest.raises(TypeError, match="must be a dense tensor, torch.strided, got "):
                call(name, x=make(X))
        with pytest.raises(TypeError, match="^t must be a dense tensor, torch.strided, got "):
            call(name, t=make(T))
