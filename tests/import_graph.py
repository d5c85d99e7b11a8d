"""The import graph of a source tree, and its cycles."""

import ast
from pathlib import Path


def read_modules(root: Path, package: str) -> dict[str, tuple[ast.Module, bool]]:
    """Modules below ``root``, by name in ``package``: (syntax tree, whether the module is a package)."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join((package, *parts[: -1 if is_package else None]))
        modules[name] = ast.parse(path.read_text(encoding="utf-8")), is_package
    return modules


def import_edges(modules: dict, lazy: bool) -> dict[str, set[str]]:
    """For each module, those it imports at import time; with ``lazy``, also inside functions or by name."""
    return {
        name: {target for node in _imports(tree, lazy) for target in _targets(node, name, is_package, modules)}
        - {name}
        for name, (tree, is_package) in modules.items()
    }


def find_cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that all import each other, directly or indirectly; each group is sorted."""
    reach = {name: _reachable(name, edges) for name in edges}
    groups = {tuple(sorted(other for other in reach[name] if name in reach[other])) for name in edges}
    return [list(group) for group in sorted(groups) if group]


def _reachable(start, edges):
    seen, left = set(), [start]
    while left:
        for target in edges[left.pop()] - seen:
            seen.add(target)
            left.append(target)
    return seen


def _imports(node, lazy):
    """Import statements that run on import; with ``lazy``, also those in functions, and calls of import_module."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and getattr(child.test, "id", None) == "TYPE_CHECKING":
            continue  # only type checkers read these
        function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(child, (ast.Import, ast.ImportFrom)) or (lazy and isinstance(child, ast.Call)):
            yield child
        if lazy or not function:
            yield from _imports(child, lazy)


def _targets(node, importer, is_package, modules):
    """The modules of the tree that a statement imports; `from package import name` means the submodule, if any."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = _base(node, importer, is_package)
        submodules = {alias.name: f"{base}.{alias.name}" for alias in node.names}
        names = [name if name in modules else base for name in submodules.values()]
    else:
        names = _named_module(node)
    return [name for name in names if name in modules]


def _base(node, importer, is_package):
    if not node.level:
        return node.module
    up = node.level - is_package
    package = importer.rsplit(".", up)[0] if up else importer
    return f"{package}.{node.module}" if node.module else package


def _named_module(call):
    """The module of ``import_module("name")``, if the name is a literal."""
    name = getattr(call.func, "attr", getattr(call.func, "id", None))
    literal = call.args and isinstance(call.args[0], ast.Constant)
    return [call.args[0].value] if name == "import_module" and literal else []
