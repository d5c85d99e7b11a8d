"""Plant an error in a copy of the kernels, and use the copy in their place."""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from ditfast import kernels

FOLDER = Path(kernels.__file__).parent
CAUGHT = "max error|relative L2 error|not finite"  # the numerical contract's messages


@dataclass
class Planted:
    op: str
    file: str  # in kernels/
    where: str  # the function
    right: str
    wrong: str
    what: str
    case: dict  # changes of the inputs

    def __str__(self):
        return f"{self.op}-{self.where}-{self.what}".replace(" ", "_")


def unchanged(planted):
    """One per operation and inputs, with the right text in place: so a planted error is all that its test sees."""
    return {(p.op, *p.case.items()): p for p in planted}.values()


def plant_in(files, planted, wrong, folder, monkeypatch):
    """Until the test ends, replace ``files`` of kernels/ with copies in ``folder``, one with the text ``wrong``.

    Rows come in chunks of 4 tokens; rows of 48 columns have a tail, which backward and tangents mask.
    """
    for name in files:
        source = (FOLDER / f"{name}.py").read_text()
        if name == planted.file:
            source = changed(source, planted.where, planted.right, wrong)
        module = load(name, source, folder, monkeypatch)
        if name == "rows":
            monkeypatch.setattr(module, "_chunk_size", lambda *_, **__: 4)
            monkeypatch.setitem(module.FORMS, 48, ((32, 16, 1), (32, 32, 1)))


def changed(source, where, right, wrong):
    """``source`` with ``right`` replaced in one function, where it must occur exactly once."""
    head, start, rest = source.partition(f"\ndef {where}(")
    body, end, tail = rest.partition("\n\n\n")
    assert start and body.count(right) == 1, f"{right!r} does not occur exactly once in {where}"
    return head + start + body.replace(right, wrong) + end + tail


def load(name, source, folder, monkeypatch):
    """Make ``ditfast.kernels.<name>`` this source until the test ends."""
    path, full = folder / f"{name}.py", f"ditfast.kernels.{name}"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(full, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, full, module)
    monkeypatch.setattr(kernels, name, module, raising=False)
    spec.loader.exec_module(module)
    return module
