"""saccade: every published attention system as one kind of part.

Importing this package imports nothing heavy: each name below is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> (module, attribute); attribute None is the module itself
_LAZY: dict[str, tuple[str, str | None]] = {
    "attend": ("saccade.ops.attend", "attend"),
    "plan": ("saccade.ops.attend", "plan"),
    "Plan": ("saccade.ops.planning", "Plan"),
    "autotune": ("saccade.ops.autotune", "autotune"),
    "merge": ("saccade.ops.merge", "merge"),
    "masks": ("saccade.ops.masks", None),
    "score_mods": ("saccade.ops.score_mods", None),
    "linear_attend": ("saccade.ops.linear", "linear_attend"),
    "linear_plan": ("saccade.ops.linear", "linear_plan"),
    "attention_map": ("saccade.ops.maps", "attention_map"),
    "catalogue": ("saccade.catalogue", None),
    "create": ("saccade.catalogue", "create"),
    "load_authors": ("saccade.catalogue", "load_authors"),
    "compressed": ("saccade.integrations.compression", "compressed"),
    "switch": ("saccade.integrations.transformers", "switch"),
    "advise": ("saccade.integrations.advise", "advise"),
    "explain": ("saccade.explain", None),
    "insert": ("saccade.integrations.insert", "insert"),
    "compare": ("saccade.train", "compare"),
    "parallel": ("saccade.parallel", None),
    "convert": ("saccade.train.conversion", "convert"),
    "load_converted": ("saccade.integrations.converted", "load_converted"),
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    try:
        module, attribute = _LAZY[name]
    except KeyError:
        raise AttributeError(f"module 'saccade' has no attribute {name!r}") from None
    loaded = importlib.import_module(module)
    value = loaded if attribute is None else getattr(loaded, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from saccade import catalogue as catalogue
    from saccade import explain as explain
    from saccade import parallel as parallel
    from saccade.catalogue import create as create
    from saccade.catalogue import load_authors as load_authors
    from saccade.integrations.advise import advise as advise
    from saccade.integrations.compression import compressed as compressed
    from saccade.integrations.converted import load_converted as load_converted
    from saccade.integrations.insert import insert as insert
    from saccade.integrations.transformers import switch as switch
    from saccade.ops import masks as masks
    from saccade.ops import score_mods as score_mods
    from saccade.ops.attend import attend as attend
    from saccade.ops.attend import plan as plan
    from saccade.ops.autotune import autotune as autotune
    from saccade.ops.linear import linear_attend as linear_attend
    from saccade.ops.linear import linear_plan as linear_plan
    from saccade.ops.maps import attention_map as attention_map
    from saccade.ops.merge import merge as merge
    from saccade.ops.planning import Plan as Plan
    from saccade.train import compare as compare
    from saccade.train.conversion import convert as convert
