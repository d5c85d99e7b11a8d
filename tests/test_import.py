"""`import ditfast` is free, and its names are loaded on first use."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fresh_interpreter import loaded_by

import ditfast

ROOT = Path(__file__).parents[1]


def test_importing_the_package_loads_nothing_else():
    assert not loaded_by("import ditfast") & {"torch", "numpy", "triton", "diffusers"}


def test_importing_the_model_loads_neither_triton_nor_diffusers():
    loaded = loaded_by("from ditfast import DiT")
    assert "torch" in loaded
    assert not loaded & {"triton", "diffusers"}


def test_every_public_name_resolves_and_is_listed():
    assert len(set(ditfast.__all__)) == len(ditfast.__all__)
    for name in ditfast.__all__:
        assert getattr(ditfast, name) is getattr(ditfast, name)
        assert name in dir(ditfast)


def test_public_names_match_their_home_modules():
    from ditfast import models, ops

    assert ditfast.DiT is models.DiT
    assert ditfast.DiT_XL_2 is models.DiT_models["DiT-XL/2"]
    assert ditfast.use_backend is ops.use_backend
    assert sum(name.startswith("DiT_") for name in ditfast.__all__) == 12 + 1  # the presets and DiT_models


def test_the_package_has_what_code_imports_from_the_originals_models():
    names = "DiT DiTBlock FinalLayer TimestepEmbedder LabelEmbedder modulate DiT_models PatchEmbed Attention Mlp"
    embeddings = ("2d_sincos_pos_embed", "2d_sincos_pos_embed_from_grid", "1d_sincos_pos_embed_from_grid")
    for name in (*names.split(), *(f"get_{embedding}" for embedding in embeddings)):
        assert getattr(ditfast, name) is getattr(ditfast.models, name)


def test_type_checkers_see_the_lazy_names():
    tree = ast.parse(Path(ditfast.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.asname: node.module for node in imports for alias in node.names}
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    assert seen == {**ditfast._HOME, **dict.fromkeys(ditfast._SUBMODULES, "ditfast")}


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'DiT_XL2'; did you mean 'DiT_XL_2'\?"):
        _ = ditfast.DiT_XL2
    with pytest.raises(AttributeError, match=r"no attribute 'zzzzzz'$"):
        _ = ditfast.zzzzzz


def test_a_checkpoint_is_loaded_without_the_compiler():
    """Inductor's imports take a second, and random numbers for meta tensors would already trigger them."""
    code = "from pathlib import Path; import ditfast; digits = Path(ditfast.__file__).parent / 'assets' / 'digits'; "
    assert "sympy" not in loaded_by(code + "ditfast.DiT.from_pretrained(digits)")


def test_a_sampling_command_on_a_cpu_needs_no_triton(tmp_path):
    out, grid = tmp_path / "out", tmp_path / "grid.png"
    code = "from ditfast.sample import main; real, sys.stdout = sys.stdout, sys.stderr; "
    code += f"main(['--demo', '--steps', '2', '--out', '{out}', '--grid', '{grid}']); sys.stdout = real"
    assert not loaded_by(code) & {"triton", "sympy"}


def test_sources_that_hide_an_installation_are_named(tmp_path):
    shutil.copytree(
        ROOT / "ditfast", tmp_path / "ditfast", ignore=shutil.ignore_patterns("__pycache__", "assets", "*.so")
    )
    command = [sys.executable, "-S", "-c", "import ditfast"]  # -S: no site-packages
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and f"from its sources in {tmp_path}, which hide" in done.stderr
