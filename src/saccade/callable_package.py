"""Packages that are functions too: `saccade.explain(...)`, `saccade.parallel(...)`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


def callable_package(name: str, function: str, lazy: Mapping[str, str]) -> Callable[[str], Any]:
    """Make a package callable; what it returns is to be the package's `__getattr__`.

    Nothing is imported before it is asked for.

    Args:
        name: of the package.
        function: "module.function" in it, which a call runs.
        lazy: what the package has by name -> the module of it that has that.
    """

    def found(attribute: str) -> Any:
        if attribute not in lazy:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        return getattr(importlib.import_module(f"{name}.{lazy[attribute]}"), attribute)

    class Package(ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            module, called = function.split(".")
            return getattr(importlib.import_module(f"{name}.{module}"), called)(*args, **options)

    sys.modules[name].__class__ = Package
    return found
