"""What a user imports."""

from fresh_interpreter import loaded_by

import ditfast
from ditfast import diffusion


def test_names():
    assert ditfast.create_diffusion is diffusion.create_diffusion
    assert ditfast.diffusion is diffusion
    for name in diffusion.__all__:
        assert hasattr(diffusion, name)


def test_importing_it_loads_neither_models_nor_optional_packages():
    loaded = loaded_by(
        "import ditfast.diffusion, ditfast.diffusion.schedulers; assert 'ditfast.ops' not in sys.modules"
    )
    assert not loaded & {"diffusers", "triton"}
