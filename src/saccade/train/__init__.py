"""Training, data and the main job: which attention should I use here?

saccade.compare(["softmax", "moba"], task="text", budget="quick", out="runs/first")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saccade.train.comparison import compare as compare
    from saccade.train.result import CompareResult as CompareResult

__all__ = ["CompareResult", "compare"]

_LAZY = {"compare": "saccade.train.comparison", "CompareResult": "saccade.train.result"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'saccade.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
