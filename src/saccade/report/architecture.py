"""The house as its imports draw it: floors, packages, who stands on whom. Read from the source, nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

import saccade

__all__ = ["FLOORS", "MODULES", "drawing", "floor_of", "graph"]

SOURCE = Path(saccade.__file__).parent

#: package or module -> (floor, what lives there); what a floor holds may import from those below it
FLOORS: dict[str, tuple[int, str]] = {
    "cli": (7, "the command line; no logic of its own"),
    "report": (7, "pages and pictures"),
    "__main__": (7, "`python -m saccade`"),
    "integrations": (6, "into transformers, diffusers and networks that exist"),
    "bench": (6, "measuring parts"),
    "train": (6, "training, data, tasks, comparisons and claims"),
    "parallel": (6, "past one machine"),
    "explain": (5, "looking inside"),
    "models": (4, "complete networks"),
    "attention": (3, "sequence mechanisms"),
    "vision": (3, "attention on feature maps"),
    "fusion": (3, "several modalities or images"),
    "compress": (3, "fewer keys and tokens"),
    "adapt": (3, "on and around somebody else's model"),
    "layers": (2, "modules that many papers share"),
    "ops": (1, "computational patterns: tensors in, tensors out"),
    "catalogue": (0, "cards, kinds, evidence, ports"),
    "callable_package": (0, "packages that are functions too"),
    "extras": (0, "packages that need not be there"),
    "tables": (0, "tables of text"),
}


def module_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


#: every module of the package and its file
MODULES = {module_of(path): path for path in SOURCE.rglob("*.py")}


def package_of(module: str) -> str:
    """The package on a floor; empty for `saccade` itself, which loads everything when it is asked for."""
    return module.split(".")[1] if "." in module else ""


def floor_of(module: str) -> int:
    """The floor of a module; -1 for `saccade` itself, from which every floor may take its names."""
    package = package_of(module)
    return FLOORS[package][0] if package else -1


def graph(*, types: bool = True) -> dict[str, set[str]]:
    """Module -> the modules of this package that it imports, at once or inside functions.

    Args:
        types: with what is imported for type checking only, which no program runs.
    """
    return {module: _imports(path, types) - {module} for module, path in MODULES.items()}


def _imports(path: Path, types: bool) -> set[str]:
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # a name of a package may be a module; else it is the package's own
            found |= names & set(MODULES)
            found |= {node.module} if names - set(MODULES) else set()
        elif types or not (isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"):
            waiting += ast.iter_child_nodes(node)
    return found & set(MODULES)


def drawing() -> str:
    """The floors from the top down, as Markdown: what each package holds and what it stands on."""
    stands: dict[str, set[str]] = {}
    for module, targets in graph().items():
        stands.setdefault(package_of(module), set()).update(map(package_of, targets))
    rows = ["| floor | package | what lives there | stands on |", "|---|---|---|---|"]
    for package, (floor, what) in FLOORS.items():
        if (SOURCE / package).is_dir():
            below = sorted(
                (other for other in stands[package] - {package, ""} if (SOURCE / other).is_dir()),
                key=lambda other: (-FLOORS[other][0], other),
            )
            named = ", ".join(f"`{other}`" for other in below) or "nothing"
            rows.append(f"| {floor} | `{package}` | {what} | {named} |")
    return "\n".join(rows)
