"""Values computed by the original implementation, with the models of tests/golden/README.md.

In `diffusion_<tag>.npz`: `x0`, `noise`, `y`; `<schedule>:<table>`; `respace:<spec>:*`; at timesteps `train_t` the
noisy `q_sample`, `loss:<kind>:*`, and `pmv:<kind>:*`, which is p_mean_variance of x0 itself;
`sample:<spec>:<sampler>`, loops without clipping from `arr("<tag>/z")`; `bpd5:*`, the bound in 5 steps.
"""

import numpy as np
import pytest
import torch

from ditfast.diffusion import LossType, create_diffusion

KINDS = {
    "mse": {},
    "kl": {"use_kl": True},
    "rescaled": {"rescale_learned_sigmas": True},
    "xstart": {"predict_xstart": True},
    "fixed_small": {"sigma_small": True, "learn_sigma": False},
    "fixed_large": {"learn_sigma": False},
}
# a KL divergence near 0 is a difference of numbers near 1, accurate to their ulp
KL_FLOOR = 2.0**-23
LEARNED = ("mse", "kl", "rescaled", "xstart")
CASES = [("tiny64", kind) for kind in KINDS] + [("tiny72", kind) for kind in LEARNED]
RESPACINGS = [("tiny64", "10"), ("tiny64", "ddim25")]
RESPACINGS += [("tiny72", spec) for spec in ("10", "10,20,30", "ddim25", "ddim50")]


def of_kind(case, kind, spec=""):
    """tiny64 predicts no variance: all its kinds have a fixed one."""
    return create_diffusion(spec, **{"learn_sigma": case.model.learn_sigma, **KINDS[kind]})


@pytest.fixture
def step_noise(monkeypatch, kit):
    """Replace random noise with named arrays: the i-th call returns `<prefix>/<i>`."""

    def named(module, prefix):
        drawn = []

        def noise_like(x, generator=None):
            drawn.append(kit.arr(f"{prefix}/{len(drawn) + 1}", tuple(x.shape)))
            return drawn[-1]

        monkeypatch.setattr(f"ditfast.diffusion.{module}.noise_like", noise_like)
        return drawn

    return named


def close_per_sample(got, expected, rtol, atol=0.0):
    """Compare relative to each sample's largest value: samples differ by orders of magnitude."""
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        tolerance = rtol * b.abs().max().item() + atol
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=lambda text, i=i: f"sample {i}: {text}")


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_tables(golden, schedule):
    diffusion = create_diffusion(None, schedule)
    values = golden["tiny72"].values
    names = [key.split(":")[1] for key in values if key.startswith(f"{schedule}:")]
    assert len(names) == 6
    for name in names:
        table = getattr(diffusion, name)
        assert table.dtype == np.float64
        # 1 - alpha_bar cancels where a variance is small: each table to a few ulp of its largest value, and close
        np.testing.assert_allclose(table, values[f"{schedule}:{name}"], rtol=1e-9, atol=1e-15, err_msg=name)


def test_respacing(golden):
    seen = set()
    for case in golden.values():
        for key in [key for key in case.values if key.endswith(":timestep_map")]:
            spec = key.split(":")[1]
            diffusion = create_diffusion(spec)
            assert diffusion.timestep_map == case.values[key].tolist()
            np.testing.assert_allclose(diffusion.betas, case.values[f"respace:{spec}:betas"], rtol=1e-9)
            seen.add(spec)
    assert seen == {"", "250", "10", "10,20,30", "ddim25", "ddim50"}


@pytest.mark.parametrize("tag", ["tiny64", "tiny72"])
def test_q_sample(golden, kit, tag):
    values = golden[tag].values
    got = create_diffusion("").q_sample(values["x0"], values["train_t"], values["noise"])
    close_per_sample(got, values["q_sample"], 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("tag, kind", CASES)
def test_training_losses(golden, kit, tag, kind):
    case, values = golden[tag], golden[tag].values
    diffusion = of_kind(case, kind)
    inputs = values["x0"], values["train_t"], {"y": values["y"]}, values["noise"]
    terms = diffusion.training_losses(case.model, *inputs)
    expected = {key.split(":")[2] for key in values if key.startswith(f"loss:{kind}:")}
    assert terms.keys() == expected >= {"loss"}
    for name in expected:
        close_per_sample(terms[name], values[f"loss:{kind}:{name}"], 1e-5, KL_FLOOR)
    assert (kind == "kl") == (diffusion.loss_type is LossType.RESCALED_KL)


@torch.no_grad()
@pytest.mark.parametrize("tag, kind", [*CASES, ("tiny64", "clipped"), ("tiny72", "clipped")])
def test_p_mean_variance(golden, kit, tag, kind):
    case, values = golden[tag], golden[tag].values
    diffusion, clipped = of_kind(case, "mse" if kind == "clipped" else kind), kind == "clipped"
    out = diffusion.p_mean_variance(
        case.model, values["x0"], values["train_t"], clip_denoised=clipped, model_kwargs={"y": values["y"]}
    )
    names = [key.split(":")[2] for key in values if key.startswith(f"pmv:{kind}:")]
    assert len(names) == (1 if clipped else 4)
    for name in names:
        close_per_sample(out[name], values[f"pmv:{kind}:{name}"], 1e-5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim_eta.5", "cfg4"])
@pytest.mark.parametrize("tag, spec", RESPACINGS)
def test_sampling(golden, kit, step_noise, tag, spec, sampler):
    case = golden[tag]
    z, y = kit.arr(f"{tag}/z", tuple(case.values["x0"].shape)), case.values["y"]
    model, kwargs, name = case.model, {"y": y}, sampler
    if sampler == "cfg4":
        z, null = torch.cat([z, z]), torch.full_like(y, model.y_embedder.num_classes)
        model, kwargs, name = model.forward_with_cfg, {"y": torch.cat([y, null]), "cfg_scale": 4.0}, "cfg"
    diffusion = of_kind(case, "mse", spec)
    drawn = step_noise("samplers", f"{tag}/{spec}/{name}")
    options = {"clip_denoised": False, "model_kwargs": kwargs}
    if sampler.startswith("ddim"):
        out = diffusion.ddim_sample_loop(model, z.shape, z, eta=0.5 if "eta" in sampler else 0.0, **options)
    else:
        out = diffusion.p_sample_loop(model, z.shape, z, **options)
    assert len(drawn) == diffusion.num_timesteps  # the last step draws, too: seeds give the original's samples
    close_per_sample(out, case.values[f"sample:{spec}:{sampler}"], 1e-4)


@pytest.mark.parametrize("tag", ["tiny64", "tiny72"])
def test_variational_bound(golden, kit, step_noise, tag):
    case, values = golden[tag], golden[tag].values
    drawn = step_noise("losses", f"{tag}/bpd")
    out = of_kind(case, "mse", "5").calc_bpd_loop(case.model, values["x0"], model_kwargs={"y": values["y"]})
    assert len(drawn) == 5
    assert out.keys() == {key.split(":")[1] for key in values if key.startswith("bpd5:")}
    for name, value in out.items():
        columns = value.T if value.dim() == 2 else value[None]  # one timestep each
        expected = values[f"bpd5:{name}"]
        close_per_sample(columns, expected.T if value.dim() == 2 else expected[None], 1e-5, KL_FLOOR)
