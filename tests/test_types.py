"""Every parameter and result of the public API has an annotation."""

import inspect
from importlib import import_module
from pathlib import Path

import pytest

import ditfast

INTEGRATIONS = ("integrations.diffusers",)
PACKAGES = ("checkpoints", "data", "diffusion", "flow", "models", "ops", *INTEGRATIONS)


def public(package) -> dict[str, object]:
    """The functions and classes that a package exports, by name."""
    values = {name: getattr(package, name) for name in package.__all__}
    return {name: value for name, value in values.items() if inspect.isfunction(value) or inspect.isclass(value)}


def signatures(name, value):
    """Each function behind a public name: itself, or a class's constructor and public methods, inherited ones too."""
    if not inspect.isclass(value):
        yield name, value
        return
    for cls in value.__mro__:
        if not cls.__module__.startswith("ditfast"):
            continue
        for key, member in vars(cls).items():
            function = getattr(
                member, "fget", getattr(member, "__func__", member)
            )  # property, class or static method
            if inspect.isfunction(function) and (key in ("__init__", "__call__") or not key.startswith("_")):
                yield f"{name}.{key}", function


def unannotated(name, function):
    found = inspect.signature(function)
    for parameter in found.parameters.values():
        if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls"):
            yield f"{name}: {parameter.name}"
    if found.return_annotation is found.empty and not name.endswith(".__init__"):
        yield f"{name}: its result"


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_public_names_are_annotated(package):
    if package in INTEGRATIONS:
        pytest.importorskip("diffusers")
    values = public(import_module(f"ditfast.{package}".rstrip(".")))
    assert values
    missing = [
        text for name, value in values.items() for each in signatures(name, value) for text in unannotated(*each)
    ]
    assert not missing, "\n".join(missing)


def test_a_missing_annotation_is_found():
    class Base:
        def __init__(self, size): ...

    class Shape(Base):
        @classmethod
        def of(cls, x: int, *rest): ...

    Base.__module__ = Shape.__module__ = "ditfast"
    missing = [text for each in signatures("Shape", Shape) for text in unannotated(*each)]
    assert missing == ["Shape.of: rest", "Shape.of: its result", "Shape.__init__: size"]


def test_every_package_with_public_names_is_checked():
    root = Path(ditfast.__file__).parent
    found = {path.parent.relative_to(root).as_posix() for path in root.rglob("*/__init__.py")}
    exporting = {name for name in found if "__all__" in (root / name / "__init__.py").read_text()}
    assert {name.replace(".", "/") for name in PACKAGES} == exporting
