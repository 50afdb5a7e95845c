"""Looking inside models and mechanisms, and ordering them: a folder a paper.

The package is a function too: `saccade.explain(model, inputs, target=None)` is `saccade.explain.explanation.explain`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        from saccade.explain.explanation import explain

        return explain(*args, **options)


sys.modules[__name__].__class__ = _Callable
