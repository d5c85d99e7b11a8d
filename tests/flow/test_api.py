"""What a user imports, and which of torch's random numbers training draws."""

import pytest
import torch
from fresh_interpreter import loaded_by

import ditfast
from ditfast import flow
from ditfast.flow import MeanFlow, create_transport, ode


def test_names():
    assert ditfast.flow is flow
    for name in flow.__all__:
        assert hasattr(flow, name)


def test_importing_it_loads_neither_models_nor_optional_packages():
    loaded = loaded_by("import ditfast.flow, ditfast.flow.schedulers; assert 'ditfast.ops' not in sys.modules")
    assert not loaded & {"diffusers", "torchdiffeq", "triton"}


def test_draws_equal_sits():
    """Noise, then times, from torch's global generator."""
    x1 = torch.zeros(4, 2, 3, 3)
    torch.manual_seed(0)
    noise, t = torch.randn_like(x1), torch.rand(4)
    torch.manual_seed(0)
    seen = []
    create_transport().training_losses(lambda x, t: seen.append((x, t)) or x, x1)
    torch.testing.assert_close(seen[0], ((1 - t).view(4, 1, 1, 1) * noise, t), rtol=0, atol=0)


@pytest.mark.parametrize("make", [create_transport, MeanFlow])
def test_gradients_reach_the_model_and_nothing_else(make):
    weight = torch.nn.Parameter(torch.tensor(0.5))
    x1 = torch.ones(2, 2, 3, 3, requires_grad=True)
    terms = make().training_losses(lambda x, t, **k: weight * x, x1, t=torch.tensor([0.1, 0.6]))
    terms["loss"].sum().backward()
    assert weight.grad.isfinite() and weight.grad != 0
    assert terms["loss"].shape == (2,) and terms["pred"].shape == x1.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    x1, t = torch.ones(2, 2, 3, 3, dtype=dtype), torch.tensor([0.1, 0.6])
    seen = []

    def model(x, t, r=None):
        seen.append(x.dtype)
        return x

    for make in (create_transport, MeanFlow):
        loss = make().training_losses(model, x1, t=t)["loss"]
        assert loss.dtype == torch.promote_types(dtype, torch.float32) and loss.isfinite().all()
    sampler = flow.Sampler(create_transport())
    for sample in (sampler.sample_ode(sampling_method="euler", num_steps=3), sampler.sample_sde(num_steps=3)):
        assert sample(x1, model)[-1].dtype == dtype
    assert MeanFlow().sample(model, x1).dtype == dtype and set(seen) == {dtype}


@pytest.mark.parametrize("method", ode.METHODS)
def test_the_last_point_alone_is_the_last_of_all(method):
    """A method with fixed steps takes them all."""
    sampler = flow.Sampler(create_transport())
    options = {"sampling_method": method, "num_steps": 4, "atol": 1e-6, "rtol": 1e-6}
    x = torch.linspace(-1, 1, 6, dtype=torch.float64).view(1, 1, 2, 3)
    every, last = (
        sampler.sample_ode(**options, last_only=only)(x, lambda x, t: torch.sin(3 * x) * (1 + t.view(-1, 1, 1, 1)))
        for only in (False, True)
    )
    assert len(every) == 4 and len(last) == 1
    torch.testing.assert_close(last[0], every[-1], rtol=1e-4, atol=1e-5)
