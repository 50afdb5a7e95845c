"""A call in one process, of which every function that goes in parts is forecast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from saccade.ops.planning import Parts, Share
from saccade.ops.sharding import Dealing, Dealt, dealing, put_in_force, suspended
from saccade.parallel.context import Watching
from saccade.parallel.rows import ROWS, forecast

__all__ = ["plan"]

#: those that are told which blocks are chosen
_CHOOSING = ("moba_attend", "prism_attend", "spargeattn_attend")


def plan(
    function: Callable[..., Any],
    *arguments: Any,
    mesh: Any,
    balance: str = "contiguous",
    unit: int = 1,
    chosen: Tensor | None = None,
    **options: Any,
) -> Parts:
    """What each rank computes, sends and receives in `function(*arguments, **options)` under `saccade.parallel`.

    Of a function that goes in parts little is computed (the feature map of linear attention, and what a function of
    the user's that is handed over gives for some tokens), and tensors may lie on the "meta" device. Anything else, a
    layer or a model, is called once on the whole sequence, on the "meta" device where it does not look at what its
    tensors hold, and what it calls is added up. FLOPs are those of functions that go in parts alone: no projection's.

    Which blocks MoBA, Prism and SpargeAttn choose depends on what the tensors hold: with `chosen` the forecast is to
    the byte, without it of the most that the settings allow, and `Parts.exact` says which.

    Args:
        function: one that goes in parts: `saccade.attend`, `saccade.linear_attend`, `moba_attend`, ...; or what calls
            such.
        arguments, options: its own, of the whole sequence.
        mesh: ranks that share the sequence: how many, one dimension of a `DeviceMesh`, or what `saccade.parallel`
            yields, which knows its own balance and unit.
        balance, unit: how it is dealt to them, as in `saccade.parallel`.
        chosen: which blocks are attended. Of MoBA the integers (B, H, N, j) of `moba_route`, -1 is none; of Prism and
            SpargeAttn the map (B, H, n, m), bool, that they give with `return_map`.

    Raises:
        ValueError: where the function does, if it does not go in parts so, or if `chosen` does not fit.

    >>> import torch, saccade
    >>> q = torch.empty(1, 8, 2**20, 64, device="meta")
    >>> print(saccade.parallel.plan(saccade.linear_attend, q, q, q, decay=0.99, mesh=8))
    8 ranks, states: at most 6.01e+10 FLOPs, 9.18e+05 bytes sent and 9.18e+05 received; balance 100%
    >>> layer, x = torch.nn.Conv1d(8, 8, 4), torch.empty(1, 8, 2**20)
    >>> print(saccade.parallel.plan(saccade.ops.neighbours.with_neighbours, layer, x, 3, dim=2, mesh=8))
    8 ranks, halo: at most 6.71e+07 FLOPs, 96 bytes sent and 96 received; balance 100%
    """
    ranks, name = dealing(mesh, balance, unit), getattr(function, "__name__", "")
    if chosen is not None and name not in _CHOOSING:
        raise ValueError(f"{name or function} chooses no blocks: chosen is for {', '.join(_CHOOSING)}")
    if name in ROWS:
        more = {} if chosen is None else {"chosen": chosen}
        return _forecast(ranks, function, _call(function, arguments, options) | more)
    rehearsal = Rehearsal(ranks)
    with put_in_force(rehearsal), Watching():
        function(*arguments, **options)
    return together(rehearsal.found, ranks.ranks)


def _call(function: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by name."""
    found = signature(function).bind(*arguments, **options)
    found.apply_defaults()
    return dict(found.arguments)


def _forecast(ranks: Dealing, function: Callable[..., Any], call: Mapping[str, Any]) -> Parts:
    """The forecast of a call of a function that goes in parts."""
    with suspended():
        return forecast(function)(ranks, function, **call)


class Rehearsal:
    """Put in force in one process: what is called is forecast for some ranks, and computed whole.

    Args:
        ranks: how sequences are dealt to them; a single one computes what does not go in parts too.

    Attributes:
        found: the forecasts, in the order of the calls.
    """

    def __init__(self, ranks: Dealing) -> None:
        self.ranks = ranks
        self.found: list[Parts] = []

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """What `function` gives.

        Raises:
            ValueError: if there is no forecast.
        """
        call = _call(function, arguments, options)
        if self.ranks.ranks > 1 or function.__name__ in ROWS:
            self.found.append(_forecast(self.ranks, function, call))
        if function.__name__ in _CHOOSING and call["q_BHND"].is_meta:  # which holds nothing to choose by
            return call["q_BHND"][..., :1].expand(-1, -1, -1, call["v_BKME"].shape[3])
        with suspended():
            return function(*arguments, **options)

    def whole(self, n: int) -> int:
        """Tokens of the whole sequence, which are those that are here."""
        return n

    def places(self, n: int, device: torch.device | str) -> Tensor:
        """Where they stand."""
        return torch.arange(n, device=device)


def work(compute: Callable[..., Any], *inputs: Any) -> tuple[int, Any]:
    """FLOPs of what a function calls that goes in parts, where one rank has all of it; and what it gives.

    Args:
        compute: the function.
        inputs: its own.
    """
    alone = Rehearsal(Dealt(1))
    with put_in_force(alone):
        out = compute(*inputs)
    return sum(parts.shares[0].flops for parts in alone.found), out


def together(found: Sequence[Parts], ranks: int) -> Parts:
    """Several forecasts as one.

    Args:
        found: those, for as many ranks.
        ranks: how many, where there are none.
    """
    paths = dict.fromkeys(parts.path for parts in found if parts.path != "alone")
    of_ranks = [[parts.shares[rank] for parts in found] for rank in range(ranks)]
    shares = (Share(*map(sum, zip(*map(astuple, [Share(0, 0, 0, 0, 0), *each])))) for each in of_ranks)
    return Parts(" and ".join(paths) or "alone", tuple(shares), all(parts.exact for parts in found))
