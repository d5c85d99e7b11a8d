"""Values from SiT's public code (MIT), with its own model and the weights of tests/golden/README.md, in float64.

In `flow.npz`: `x1`, `noise`, `y`, `t`; `pred` and `loss:<path>:<prediction>:<weight>`; the last points of
`ode:<path>:<prediction>:<method>`, `reverse:<path>:<prediction>`, and, with diffusion_norm=0.7 and step noise
`arr("flow/sde/<i>")`, `sde:<path>:<prediction>:<method>:<form>:<last step>`; with the signs of `arr("flow/signs")`
`likelihood:<path>:<prediction>:<method>`. Non-finite values are left out, as are those that start at time 1 of VP,
where the path has no noise to divide by.
"""

import json

import numpy as np
import pytest
import torch
from golden_values import GOLDEN, arr, close, fill

from ditfast.flow import Sampler, create_transport
from ditfast.models import DiT

FILE = GOLDEN / "flow.npz"
PATHS, PREDICTIONS = ("Linear", "GVP", "VP"), ("velocity", "noise", "score")
POINTS = {"euler": 5, "heun2": 4, "dopri5": 3}
flows = pytest.mark.parametrize("flow", [f"{path}:{prediction}" for path in PATHS for prediction in PREDICTIONS])


@pytest.fixture(scope="module")
def values():
    found = {k: torch.from_numpy(v) if v.ndim else v for k, v in np.load(FILE).items()}
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in found.items()}


@pytest.fixture(scope="module")
def model(values):
    """A float64 DiT with learn_sigma; SiT drops its second half of channels."""
    return fill(DiT(**json.loads(str(values["cfg"])))).double().eval()


def cases(values, kind, flow):
    """The rest of each key with this prefix, and its value."""
    found = {key.removeprefix(f"{kind}:{flow}:"): v for key, v in values.items() if key.startswith(f"{kind}:{flow}")}
    assert found
    return found.items()


def exact_inputs(values):
    """Inputs in full precision: the file rounds everything to float32, but its values were computed with these."""
    return arr("flow/x1", (2, 2, 4, 4)).double(), arr("flow/noise", (2, 2, 4, 4)).double(), {"y": values["y"]}


@flows
@torch.no_grad()
def test_losses(values, model, flow):
    x1, noise, kwargs = exact_inputs(values)
    assert torch.equal(x1, values["x1"]) and torch.equal(noise, values["noise"])
    t = torch.tensor([0.07, 0.91], dtype=torch.float64)
    losses = cases(values, "loss", flow)
    assert len(losses) == 3
    for weight, expected in losses:
        transport = create_transport(*flow.split(":"), None if weight == "None" else weight)
        terms = transport.training_losses(model, x1, kwargs, t=t, noise=noise)
        close(terms["loss"], expected, 3e-7)
        assert terms["pred"].shape == x1.shape
    if flow == "Linear:velocity":
        close(terms["pred"], values["pred"], 3e-7)


@flows
def test_odes(values, model, flow):
    x1, noise, kwargs = exact_inputs(values)
    sampler = Sampler(create_transport(*flow.split(":")))
    for method, expected in cases(values, "ode", flow):
        if method == "dopri5":
            pytest.importorskip("torchdiffeq")
        points = sampler.sample_ode(sampling_method=method, num_steps=POINTS[method])(noise, model, **kwargs)
        assert points.shape == (POINTS[method], *noise.shape) and torch.equal(points[0], noise)
        close(points[-1], expected, 3e-7)
    if not flow.startswith("VP"):
        back = sampler.sample_ode(sampling_method="euler", num_steps=4, reverse=True)(x1, model, **kwargs)
        close(back[-1], values[f"reverse:{flow}"], 3e-7)


@flows
def test_sdes(values, model, flow, monkeypatch):
    _, noise, kwargs = exact_inputs(values)
    sampler = Sampler(create_transport(*flow.split(":")))
    drawn = []

    def noise_like(x, generator=None):
        drawn.append(arr(f"flow/sde/{len(drawn) + 1}", tuple(x.shape)).double())
        return drawn[-1]

    monkeypatch.setattr("ditfast.flow.sde.noise_like", noise_like)
    for case, expected in cases(values, "sde", flow):
        method, form, last = case.split(":")
        drawn.clear()
        settings = {"sampling_method": method, "diffusion_form": form, "last_step": None if last == "None" else last}
        points = sampler.sample_sde(**settings, diffusion_norm=0.7, num_steps=4)(noise, model, **kwargs)
        assert len(points) == 4 and len(drawn) == 3
        close({case: points[-1]}, {case: expected}, 3e-7)


@pytest.mark.parametrize("flow", [f"{path}:{prediction}" for path in PATHS[:2] for prediction in PREDICTIONS])
def test_likelihoods(values, model, flow, monkeypatch):
    pytest.importorskip("torchdiffeq")
    x1, _, kwargs = exact_inputs(values)
    monkeypatch.setattr("ditfast.flow.sampler.noise_like", lambda x, generator: arr("flow/signs", tuple(x.shape)))
    sampler = Sampler(create_transport(*flow.split(":")))
    for method, expected in cases(values, "likelihood", flow):
        points = {"euler": 4, "dopri5": 3}[method]
        log_p, noise = sampler.sample_ode_likelihood(sampling_method=method, num_steps=points)(x1, model, **kwargs)
        assert log_p.shape == (2,) and noise.shape == x1.shape and not log_p.requires_grad
        close({method: log_p}, {method: expected}, 1e-6)
