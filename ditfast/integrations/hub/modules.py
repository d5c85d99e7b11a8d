"""Which modules of this package another one needs, and how they import each other under any name."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

ROOT = "ditfast"
_FOLDERS = {ROOT: find_spec(ROOT), f"{ROOT}.kernels": find_spec(f"{ROOT}.kernels")}  # kernels/ may be elsewhere


def needed_by(*names: str) -> dict[str, Path]:
    """Modules of this package by name, with their sources: those named, and what their code imports anywhere.

    The package itself is none of them: its lazy names would lead to everything.
    """
    found, left = {}, list(names)
    while left:
        name = left.pop()
        path = source_of(name)
        if path is None or name in found or name == ROOT:
            continue
        found[name] = path
        left.append(name.rpartition(".")[0])  # the package around it runs first
        for node in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            left += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return dict(sorted(found.items()))


def source_of(name: str) -> Path | None:
    """The file of a module; None for what is none, as a function, or has no source."""
    top = f"{ROOT}.kernels" if name.split(".")[:2] == [ROOT, "kernels"] else ROOT
    (folder,) = _FOLDERS[top].submodule_search_locations
    path = Path(folder, *name.removeprefix(top).split("."))
    for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if file.is_file():
            return file
    return None


def relative(code: str, depth: int) -> str:
    """The code with this package's modules imported relative to a module that many packages below the root.

    Raises:
        ValueError: an import that has no relative form.
    """
    lines = code.splitlines(keepends=True)
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == ROOT for alias in node.names):
            raise ValueError(
                f"line {node.lineno} must import names from {ROOT}, got {lines[node.lineno - 1].strip()!r}"
            )
    for node in _imports(tree):
        rest = node.module.removeprefix(ROOT).removeprefix(".")
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = re.sub(
            rf"from {re.escape(node.module)} import", f"from {'.' * (depth + 1)}{rest} import", line
        )
    return "".join(lines)


def _imports(tree: ast.AST) -> list[ast.ImportFrom]:
    """The statements that import from this package."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    return [node for node in nodes if node.module.split(".")[0] == ROOT]
