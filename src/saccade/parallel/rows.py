"""The functions of a sequence that know how to go in parts, by name: the row of each."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

#: function marked `saccade.ops.sharding.in_parts` -> the module of this package whose function of that name computes it
ROWS = {
    "attend": "dense",
    "attend_apart": "apart",
    "attend_in_chunks": "apart",
    "with_neighbours": "halos",
    "window_attend": "windows",
    "on_filled": "windows",
    "packed_window_attend": "windows",
    "moba_attend": "routed",
    "prism_attend": "routed",
    "spargeattn_attend": "routed",
    "documents_of": "packed",
    "ema": "scans",
    "expanded_attend": "states",
    "linear_attend": "states",
    "selective_scan": "scans",
    "wkv": "scans",
}


def name_of(function: Callable[..., Any]) -> str:
    """The name of a function that knows how to go in parts.

    Args:
        function: one that is marked.

    Raises:
        ValueError: if it does not.
    """
    name = getattr(function, "__name__", repr(function))
    if name not in ROWS:
        raise ValueError(
            f"{name} does not take a sequence in parts: saccade.parallel knows {', '.join(sorted(ROWS))}; "
            "what is the same on every rank goes under saccade.parallel.replicated()"
        )
    return name


def row(function: Callable[..., Any]) -> Callable[..., Any]:
    """What computes a function for a sequence in parts: `row(shards, function, *arguments, **options)`.

    Args:
        function: one that is marked.

    Raises:
        ValueError: if there is none.
    """
    name = name_of(function)
    return getattr(importlib.import_module(f"saccade.parallel.{ROWS[name]}"), name)
