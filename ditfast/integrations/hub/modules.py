"""Collect the modules of this package that another one needs, and make their imports relative."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = "ditfast"
_FOLDERS: dict[str, Any] = {name: find_spec(name) for name in (ROOT, f"{ROOT}.kernels")}  # kernels/ may be elsewhere


def needed_by(*names: str) -> dict[str, Path]:
    """The named modules and all that their code imports: name -> source file.

    The package itself is not included: its lazy names would lead to everything.
    """
    found: dict[str, Path] = {}
    left = list(names)
    while left:
        name = left.pop()
        path = source_of(name)
        if path is None or name in found or name == ROOT:
            continue
        found[name] = path
        left.append(name.rpartition(".")[0])  # its package runs first
        for node in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            left += [_module(node), *(f"{_module(node)}.{alias.name}" for alias in node.names)]
    return dict(sorted(found.items()))


def source_of(name: str) -> Path | None:
    """The file of a module; None if the name is not a module, or has no source."""
    top = f"{ROOT}.kernels" if name.split(".")[:2] == [ROOT, "kernels"] else ROOT
    (folder,) = _FOLDERS[top].submodule_search_locations
    path = Path(folder, *name.removeprefix(top).split("."))
    for file in (path / "__init__.py", path.with_name(f"{path.name}.py")):
        if file.is_file():
            return file
    return None


def relative(code: str, depth: int) -> str:
    """Rewrite the code's imports of this package as relative ones, for a module ``depth`` packages below the root.

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
        rest = _module(node).removeprefix(ROOT).removeprefix(".")
        line = lines[node.lineno - 1]
        lines[node.lineno - 1] = re.sub(
            rf"from {re.escape(_module(node))} import", f"from {'.' * (depth + 1)}{rest} import", line
        )
    return "".join(lines)


def _imports(tree: ast.AST) -> list[ast.ImportFrom]:
    """The statements that import from this package."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    return [node for node in nodes if _module(node).split(".")[0] == ROOT]


def _module(node: ast.ImportFrom) -> str:
    return node.module or ""  # empty only for relative imports
