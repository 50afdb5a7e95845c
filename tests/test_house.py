"""The floors of the house: nothing imports what stands above it, no room another room, and nothing in a circle; and the
form of its rooms and files.

And what a package says it gives, it has.

Imports inside functions count, and, but for circles, those for type checking. Names of modules in strings
(`"saccade.attention.moba:f"`) do not: the catalogue and the integrations find rooms by name.
"""

import importlib
from graphlib import CycleError, TopologicalSorter

import pytest

from saccade import catalogue
from saccade.report.architecture import FLOORS, MODULES, floor_of, graph, package_of

ROOMS = {paper.room for paper in [*catalogue.papers(), catalogue.paper("softmax")] if paper.room}

#: of a file
MOST_LINES = 400


def room_of(module: str) -> str | None:
    return next((room for room in ROOMS if module == room or module.startswith(f"{room}.")), None)


GRAPH = graph()


def test_every_package_has_a_floor() -> None:
    assert not {package_of(module) for module in MODULES} - set(FLOORS) - {""}


@pytest.mark.parametrize("package", sorted({package_of(module) for module in MODULES} - {""}))
def test_nothing_imports_what_stands_above_it(package: str) -> None:
    upwards = [
        f"{module} -> {target}"
        for module, targets in GRAPH.items()
        for target in targets
        if package_of(module) == package and floor_of(target) > FLOORS[package][0]
    ]
    assert not upwards, "\n".join(upwards)


def test_no_room_imports_a_room() -> None:
    sideways = [
        f"{module} -> {target}"
        for module, targets in GRAPH.items()
        for target in targets
        if room_of(module) and room_of(target) and room_of(module) != room_of(target)
    ]
    assert not sideways, "\n".join(sideways)


def test_nothing_is_imported_in_a_circle() -> None:
    runs = {module: targets - {"saccade"} for module, targets in graph(types=False).items() if module != "saccade"}
    try:
        order = list(TopologicalSorter(runs).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None
    assert order.index("saccade.ops.backends.stream") < order.index("saccade.ops.attend")


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_has_the_one_form(room: str) -> None:
    """A folder: the page, one to four files of mathematics, and beside them `authors.py` and `claim.py`."""
    folder = MODULES[room].parent
    assert MODULES[room].name == "__init__.py"
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert "claim" in files
    beside = {"authors", "claim"}
    for module, targets in GRAPH.items():
        if room_of(module) == room and module.split(".")[-1] not in beside:
            assert not targets & {f"{room}.{name}" for name in beside}, f"{module} imports its claim or its ports"


@pytest.mark.parametrize("package", sorted(name for name, path in MODULES.items() if path.name == "__init__.py"))
def test_a_package_has_every_name_that_it_exports(package: str) -> None:
    loaded = importlib.import_module(package)
    assert not [name for name in getattr(loaded, "__all__", ()) if not hasattr(loaded, name)]


def test_no_file_is_so_long_that_two_things_live_in_it() -> None:
    """Where one is, it is parted by what it holds, not by length."""
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert not {module: count for module, count in lines.items() if count > MOST_LINES}


def test_the_floors_are_seen() -> None:
    assert "saccade.ops.attend" in GRAPH["saccade.layers.softmax_attention"]
    assert room_of("saccade.attention.moba.layer") == "saccade.attention.moba"
    assert len(ROOMS) == len(catalogue.parts())
