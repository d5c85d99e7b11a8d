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
    from ditfast.diffusion import gaussian_diffusion, respace, timestep_sampler

    for name in ("GaussianDiffusion", "ModelMeanType", "ModelVarType", "LossType", "get_named_beta_schedule"):
        assert getattr(gaussian_diffusion, name) is getattr(diffusion, name)
    assert respace.space_timesteps is diffusion.space_timesteps
    for name in ("UniformSampler", "LossSecondMomentResampler", "create_named_schedule_sampler"):
        assert getattr(timestep_sampler, name) is getattr(diffusion, name)


def test_importing_it_loads_neither_models_nor_optional_packages():
    loaded = loaded_by(
        "import ditfast.diffusion, ditfast.diffusion.schedulers; assert 'ditfast.ops' not in sys.modules"
    )
    assert not loaded & {"diffusers", "triton"}
