"""No module imports itself through others, and no file is too long."""

from pathlib import Path

import pytest
from import_graph import find_cycles, import_edges, read_modules

ROOT = Path(__file__).resolve().parents[1]
NOT_OURS = {"build", "dist"}


@pytest.fixture(scope="module")
def modules():
    return {**read_modules(ROOT / "ditfast", "ditfast"), **read_modules(ROOT / "kernels", "ditfast.kernels")}


def as_text(cycles):
    return "\n".join(f"import cycle: {', '.join(cycle)}" for cycle in cycles)


def test_no_cycle_at_import_time(modules):
    cycles = find_cycles(import_edges(modules, lazy=False))
    assert not cycles, as_text(cycles)


def test_models_and_checkpoints_are_the_only_lazy_cycle(modules):
    """`DiT.from_pretrained` is a method, and the function it calls builds a `DiT`."""
    edges = import_edges(modules, lazy=True)
    edges["ditfast.models.dit"].remove("ditfast.checkpoints")
    cycles = find_cycles(edges)
    assert not cycles, as_text(cycles)


def tree(folder, **sources):
    """Modules of a package p with these sources; __ in a name separates folders."""
    for name, source in sources.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(source)
    return read_modules(folder, "p")


def cycles_of(found, lazy=False):
    return find_cycles(import_edges(found, lazy))


def test_a_cycle_lists_its_modules(tmp_path):
    found = tree(tmp_path, a="import p.b", b="from p.c import f", c="from p import a", d="import p.a")
    assert cycles_of(found) == [["p.a", "p.b", "p.c"]]


def test_a_tree_without_cycles_has_none(tmp_path):
    assert cycles_of(tree(tmp_path, a="import os, p.b", b="from p.c import f", c=""), lazy=True) == []


def test_lazy_imports_count_only_when_asked_for(tmp_path):
    lazy = ("def f():\n    import p.a", 'from importlib import import_module\nx = lambda: import_module("p.a")')
    for i, source in enumerate(lazy):
        found = tree(tmp_path / str(i), a="import p.b", b=source)
        assert cycles_of(found) == [] and cycles_of(found, lazy=True) == [["p.a", "p.b"]]


def test_imports_for_type_checkers_do_not_count(tmp_path):
    found = tree(tmp_path, a="if TYPE_CHECKING:\n    import p.b", b="import p.a")
    assert cycles_of(found) == [] and cycles_of(found, lazy=True) == []


def test_an_import_inside_a_class_or_try_runs_at_import_time(tmp_path):
    found = tree(tmp_path, a="try:\n    import p.b\nexcept ImportError:\n    pass", b="class C:\n    import p.a")
    assert cycles_of(found) == [["p.a", "p.b"]]


def test_from_a_package_means_the_submodule_if_there_is_one(tmp_path):
    found = tree(tmp_path, s__one="from p.s import two", s__two="import os", user="from p.s import name")
    (tmp_path / "s/__init__.py").write_text("from p.s import one")
    assert cycles_of(read_modules(tmp_path, "p")) == []
    assert import_edges(found, lazy=False)["p.user"] == {"p.s"}
    (tmp_path / "s/two.py").write_text("from p.s import helper")
    assert cycles_of(read_modules(tmp_path, "p")) == [["p.s", "p.s.one", "p.s.two"]]


def test_relative_imports_are_followed(tmp_path):
    found = tree(tmp_path, s__one="from .two import f", s__two="from ..s import one")
    assert cycles_of(found) == [["p.s.one", "p.s.two"]]


def sources():
    """All Python files except those in environments and builds."""
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if not any(part.startswith(".") or part in NOT_OURS for part in parts):
            yield path, 400 if parts[0] == "tests" else 300


def test_files_are_short():
    found = {
        path.relative_to(ROOT).as_posix(): (len(path.read_text().splitlines()), most) for path, most in sources()
    }
    assert "ditfast/models/dit.py" in found
    long = [f"{name} has {lines} lines, more than {most}" for name, (lines, most) in found.items() if lines > most]
    assert not long, "\n".join(long)
