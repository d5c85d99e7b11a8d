"""The operations as a kernel repository: its layout, loading it without this package, and with `kernels`."""

import ast
import base64
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ditfast.integrations.hub import __main__ as hub
from ditfast.integrations.hub import modules

KERNELIZED = Path(__file__).with_name("kernelized.py")
LOAD = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
import torch
repository = Path(sys.argv[1])
def load(folder, name):  # as `kernels` does
    spec = spec_from_file_location(name, folder / "__init__.py")
    sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
ids = dict(pair.split("=") for pair in sys.argv[2:])
first, second = (load(repository / "build" / variant, ids[variant]) for variant in ids)
former = load(repository / "build/torch-cpu/ditfast", "former")
assert former.mlp is sys.modules[ids["torch-cpu"]].mlp
x, y, gate, shift, scale = torch.randn(2, 5, 16), torch.randn(2, 5, 16), *torch.randn(3, 2, 16).unbind(0)
leaves = [t.requires_grad_() for t in (x, y, gate, shift, scale)]
for module in (first, second):
    results = []
    for backend in ("reference", "triton"):
        out = module.gated_residual_layer_norm_modulate(*leaves, backend=backend)
        results.append((*out, *torch.autograd.grad(out[1].square().sum() + out[0].sum(), leaves)))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert getattr(torch.ops, module.__name__).mlp.default in module.ops.registration._implementations
assert first.ops.registration._library is not second.ops.registration._library
assert "ditfast" not in sys.modules
try:
    first.mlp(x, torch.randn(8, 16), torch.randn(8), torch.randn(16, 8), backend="host")
except RuntimeError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "ditfast"
    hub.main([str(folder), "--version", "1"])
    return folder


def metadata(repository, variant):
    return json.loads((repository / "build" / variant / "metadata.json").read_text())


def python(folder, *arguments):
    """Run Python in ``folder``, away from this project's ``kernels/``; return its output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DITFAST_")}
    environment |= {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_layout(repository):
    names = {path.relative_to(repository).as_posix() for path in repository.rglob("*") if path.is_file()}
    assert {"README.md", "benchmarks/benchmark.py"} <= names
    for variant in hub.VARIANTS:
        inside = {"__init__.py", "metadata.json", "layers.py", "ops/mlp.py", "kernels/gelu.py", "ditfast/__init__.py"}
        assert {f"build/{variant}/{name}" for name in inside} <= names
    assert not [name for name in names if name.endswith(".so") or "models" in name or "integrations" in name]
    card = (repository / "README.md").read_text()
    assert "version=1" in card and "LayerNormModulate, GatedResidual, Mlp, Attention" in card


@pytest.mark.parametrize("variant", hub.VARIANTS)
def test_metadata(repository, variant):
    found = metadata(repository, variant)
    assert found["id"].isidentifier() and found["name"] == "ditfast" and found["version"] == 1
    assert found["backend"] == hub.VARIANTS[variant]
    folder = repository / "build" / variant
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    files.pop("metadata.json")
    hashes = {name: hashlib.sha256(path.read_bytes()).digest() for name, path in files.items()}
    assert found["digest"]["files"] == {name: base64.b64encode(value).decode() for name, value in hashes.items()}


def test_nothing_is_imported_by_the_packages_name(repository):
    for path in (repository / "build").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level > 0 or node.module.split(".")[0] != "ditfast", path
                depth = len(path.relative_to(repository / "build").parts) - 1
                assert node.level <= depth, path
            elif isinstance(node, ast.Import):
                assert not [alias for alias in node.names if alias.name.startswith("ditfast")], path


def test_every_content_has_its_own_name():
    one, other = {"a.py": "x = 1"}, {"a.py": "x = 2"}
    ids = {hub.identifier(one, "cuda"), hub.identifier(other, "cuda"), hub.identifier(one, "cpu")}
    assert len(ids) == 3 and hub.identifier(dict(one), "cpu") in ids


def test_relative_imports():
    lines = ["from ditfast.ops import (", "    a,", ")", "import torch", "def f():", "    from ditfast import _C"]
    expected = ["from ..ops import (", *lines[1:5], "    from .. import _C"]
    assert modules.relative("\n".join(lines), 1) == "\n".join(expected)
    assert modules.relative("from ditfast.a.b import c", 0) == "from .a.b import c"
    with pytest.raises(ValueError, match="line 2 must import names from ditfast, got 'import ditfast.ops as o'"):
        modules.relative("import torch\nimport ditfast.ops as o\n", 0)


def test_two_copies_without_the_package(repository, tmp_path):
    (tmp_path / "load.py").write_text(LOAD)
    ids = [f"{variant}={metadata(repository, variant)['id']}" for variant in hub.VARIANTS]
    said = python(tmp_path, "load.py", repository, *ids)
    assert said == "mlp: backend 'host' cannot run: the extension ditfast._C is not built\n"


def test_loaded_and_kernelized(repository, tmp_path):
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package kernels")
    assert python(tmp_path, KERNELIZED, repository) == "as the model computes by itself\n"


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["{folder}"], "OUT must be a new or empty folder, got {folder}"),
        (["{folder}/file"], "OUT must be a new or empty folder, got {folder}/file"),
        (["{folder}/new", "--version", "-1"], "argument --version: must be at least 0, got -1"),
    ],
)
def test_refusals(refusal_of, tmp_path, arguments, reason):
    (tmp_path / "file").touch()
    message = refusal_of(hub.main)([argument.format(folder=tmp_path) for argument in arguments])
    assert message.endswith(f"error: {reason.format(folder=tmp_path)}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
