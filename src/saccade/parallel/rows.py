"""The functions of a sequence that know how to go in parts, by name: the row of each, and its forecast."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

#: function marked `saccade.ops.sharding.in_parts` -> the module of this package whose function of that name computes
#: it, and that of `forecasts` whose function of that name says what it costs
ROWS = {
    "attend": ("dense", "keys"),
    "attend_apart": ("apart", "dealt"),
    "attend_in_chunks": ("apart", "dealt"),
    "with_neighbours": ("halos", "keys"),
    "window_attend": ("windows", "keys"),
    "on_filled": ("windows", "dealt"),
    "packed_window_attend": ("windows", "keys"),
    "moba_attend": ("routed", "chosen"),
    "prism_attend": ("routed", "chosen"),
    "spargeattn_attend": ("routed", "chosen"),
    "documents_of": ("packed", "dealt"),
    "ema": ("scans", "states"),
    "expanded_attend": ("states", "states"),
    "linear_attend": ("states", "states"),
    "selective_scan": ("scans", "states"),
    "wkv": ("scans", "states"),
}


def row(function: Callable[..., Any]) -> Callable[..., Any]:
    """What computes a function for a sequence in parts: `row(shards, function, *arguments, **options)`.

    Args:
        function: one that is marked.

    Raises:
        ValueError: if there is none.
    """
    name = _name(function)
    return getattr(importlib.import_module(f"saccade.parallel.{ROWS[name][0]}"), name)


def forecast(function: Callable[..., Any]) -> Callable[..., Any]:
    """What says what that costs: `forecast(ranks, function, **call)`, of a call on the whole sequence.

    Args:
        function: one that is marked.

    Raises:
        ValueError: if there is none.
    """
    name = _name(function)
    return getattr(importlib.import_module(f"saccade.parallel.forecasts.{ROWS[name][1]}"), name)


def _name(function: Callable[..., Any]) -> str:
    name = getattr(function, "__name__", repr(function))
    if name not in ROWS:
        raise ValueError(
            f"{name} does not take a sequence in parts: saccade.parallel knows {', '.join(sorted(ROWS))}; "
            "what is the same on every rank goes under saccade.parallel.replicated()"
        )
    return name
