"""The modules of `ops` stand in an order: none imports, at once, later or for its types, what imports it."""

from graphlib import CycleError, TopologicalSorter

from saccade.report.architecture import graph, package_of


def test_no_module_imports_what_imports_it() -> None:
    ops = {module: targets for module, targets in graph().items() if package_of(module) == "ops"}
    try:
        order = list(TopologicalSorter(ops).static_order())
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None
    assert order.index("saccade.ops.backends.stream") < order.index("saccade.ops.attend")
    assert order.index("saccade.ops.attend") < order.index("saccade.ops.autotune")
