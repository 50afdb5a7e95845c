"""Looking inside models and mechanisms, and ordering them: a folder a paper.

The package is a function too: `saccade.explain(model, inputs, target=None)` is `saccade.explain.explanation.explain`.
And it has what a user asks for by name: `recorded`, `run_with_cache`, `Attribution`, `Explanation`, `METHODS`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

#: name -> the module that has it
_LAZY = {
    "Attribution": "words",
    "run_with_cache": "words",
    "recorded": "recording",
    "Explanation": "explanation",
    "METHODS": "methods",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'saccade.explain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"saccade.explain.{_LAZY[name]}"), name)


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from saccade.explain.explanation import explain

        return explain(*args, **options)


sys.modules[__name__].__class__ = _Callable
