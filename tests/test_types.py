"""Every parameter and return value of the public API is annotated."""

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
    """(name, function, whether its first parameter is bound) of a function, or of a class and its ditfast bases."""
    if not inspect.isclass(value):
        yield name, value, False
        return
    for cls in (cls for cls in value.__mro__ if cls.__module__.startswith("ditfast")):
        for key, member in vars(cls).items():
            # of a property, class method or static method
            function = getattr(member, "fget", getattr(member, "__func__", member))
            if key.startswith("_") and key not in ("__init__", "__call__"):
                continue
            if inspect.isfunction(function) and function.__module__ != "typing":  # a Protocol's __init__
                yield f"{name}.{key}", function, not isinstance(member, staticmethod)


def unannotated(name, function, is_bound):
    found = inspect.signature(function)
    for parameter in list(found.parameters.values())[is_bound:]:
        if parameter.annotation is parameter.empty:
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

        @staticmethod
        def area(side) -> float: ...

    Base.__module__ = Shape.__module__ = "ditfast"
    missing = [text for each in signatures("Shape", Shape) for text in unannotated(*each)]
    assert missing == ["Shape.of: rest", "Shape.of: its result", "Shape.area: side", "Shape.__init__: size"]


def test_every_package_with_public_names_is_checked():
    root = Path(ditfast.__file__).parent
    found = {path.parent.relative_to(root).as_posix() for path in root.rglob("*/__init__.py")}
    exporting = {name for name in found if "__all__" in (root / name / "__init__.py").read_text()}
    assert {name.replace(".", "/") for name in PACKAGES} == exporting
