"""What a user imports."""

from fresh_interpreter import loaded_by

import ditfast
from ditfast import diffusion


def test_names():
    assert ditfast.create_diffusion is diffusion.create_diffusion
    assert ditfast.diffusion is diffusion
    for name in diffusion.__all__:
        assert hasattr(diffusion, name)


def test_modules_of_the_original():
    """Code that imports from them finds the original's names."""
    from ditfast.diffusion import diffusion_utils, gaussian_diffusion, losses, respace, timestep_sampler

    for name in ("GaussianDiffusion", "ModelMeanType", "ModelVarType", "LossType", "get_named_beta_schedule"):
        assert getattr(gaussian_diffusion, name) is getattr(diffusion, name)
    assert gaussian_diffusion.mean_flat is losses.mean_flat
    assert respace.space_timesteps is diffusion.space_timesteps
    assert respace.SpacedDiffusion is diffusion.GaussianDiffusion
    samplers = "UniformSampler", "LossSecondMomentResampler", "ScheduleSampler", "LossAwareSampler"
    for name in (*samplers, "create_named_schedule_sampler"):
        assert getattr(timestep_sampler, name) is getattr(diffusion, name)
    for name in ("normal_kl", "discretized_gaussian_log_likelihood", "approx_standard_normal_cdf"):
        assert callable(getattr(diffusion_utils, name))


def test_importing_it_loads_neither_models_nor_optional_packages():
    loaded = loaded_by(
        "import ditfast.diffusion, ditfast.diffusion.schedulers; assert 'ditfast.ops' not in sys.modules"
    )
    assert not loaded & {"diffusers", "triton"}
