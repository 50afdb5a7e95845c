"""The modules of `ops` stand in an order: none imports, at once or later, what imports it."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import saccade

OPS = Path(saccade.__file__).parent / "ops"


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # a name of a package may be a module; else it is the package's own
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & set(modules) if names & set(modules) else {node.module}
    return found & set(modules)


def test_no_module_imports_what_imports_it() -> None:
    modules = {}
    for path in OPS.rglob("*.py"):
        parts = path.relative_to(OPS.parent.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {name: _imports(path, modules) - {name} for name, path in modules.items()}
    try:
        order = list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None
    assert order.index("saccade.ops.backends.stream") < order.index("saccade.ops.attend")
    assert order.index("saccade.ops.attend") < order.index("saccade.ops.autotune")
