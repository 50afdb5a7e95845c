"""`attend` on a sequence in parts, under any mask.

Who needs which keys is read off the mask. Where no rank needs more of the others than a rank holds (windows,
neighbourhoods, short documents), all of that is fetched at once, a halo; else keys and values go round the ranks
(`ring`), so that no rank ever holds the whole.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.ops.attend import as_mask, problem_of
from saccade.ops.autocast import one_type
from saccade.ops.merge import merge
from saccade.ops.planning import nothing
from saccade.ops.sharding import goes_round, is_softmax, needs_of
from saccade.parallel.context import Shards
from saccade.parallel.exchange import exchange, tied
from saccade.parallel.parts import Call, Held, elements, side_by_side, unpacked
from saccade.parallel.ring import ring


@torch.compiler.disable
def attend(
    shards: Shards, function: Callable[..., Any], q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, **options: Any
) -> Any:
    """This rank's rows of `saccade.attend`.

    Args:
        shards: the ranks.
        function: `saccade.attend`, for what this rank has in its hands.
        q_BHND, k_BKMD, v_BKME: this rank's part.
        options: those of `saccade.attend`; the mask is of the whole sequence.

    Raises:
        ValueError: where `saccade.attend` does.
    """
    q, k, v = one_type(q_BHND, k_BKMD, v_BKME)
    queries, keys = shards.layouts(q.shape[2], k.shape[2])
    backend = options.pop("backend", None)
    # what is wrong with a call is said in the same words as in one process
    problem_of(_as_whole(q, queries.length), _as_whole(k, keys.length), _as_whole(v, keys.length), **options)
    mask = options.pop("mask", None)
    if mask is not None:
        mask = as_mask(mask, q.shape[0], q.shape[1], queries.length, keys.length, q.device)
        mask = mask.simplified(queries.length, keys.length)
    normalize = options.get("normalize", "softmax")
    needs = needs_of(mask, queries, keys, side_by_side=not is_softmax(normalize))
    call = Call(shards, function, needs, {**options, "backend": backend})
    by_ring = goes_round(needs, options.get("score"), options.get("score_mod"), normalize)
    out, lse = ring(call, q, k, v) if by_ring else _at_once(call, q, k, v)
    return (out, lse) if options.get("return_lse") else out


def _as_whole(x: Tensor, length: int) -> Tensor:
    return torch.empty((*x.shape[:2], length, *x.shape[3:]), dtype=x.dtype, device="meta")


def halo(call: Call, k: Tensor, v: Tensor) -> tuple[list[Held], Tensor | None]:
    """All that this rank needs, with its own, where runs that touch are one; and what came, None where nothing had to.

    Args:
        call: what is attended.
        k, v: this rank's part.
    """
    ranks, held = range(call.shards.ranks), call.own(k, v)
    if not call.needs.steps:
        return side_by_side(held), None
    asked, wanted = [call.asked(rank) for rank in ranks], [call.wanted(rank) for rank in ranks]
    send, receive = ([elements(k, v, runs) for runs in of_all] for of_all in (asked, wanted))
    flat = torch.cat([call.packed(k, v, runs) for runs in asked])
    got = exchange(call.shards, flat, send, receive, "halo")
    held += unpacked(got, k, v, [run for runs in wanted for run in runs])
    return side_by_side(held), got


def _at_once(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    held, got = halo(call, k, v)
    tiles = list(call.tiles(held))
    several = len({tile.queries for tile, _, _ in tiles}) < len(tiles)
    with_lse = bool(several or call.options.get("return_lse"))
    parts: dict[range, Any] = {}
    for tile, seen, one in tiles:
        rows = call.rows(tile.queries)
        part = call.run(q[:, :, rows], one.keys[:, :, seen], one.values[:, :, seen], tile, with_lse)
        if tile.queries in parts:
            part = merge(*parts[tile.queries], *part)
        parts[tile.queries] = part if with_lse else (part, None)
    for piece in call.needs.queries.pieces(call.shards.rank):
        if piece not in parts:  # it may see nothing
            parts[piece] = nothing(q[:, :, call.rows(piece)], k, v, *call.captured)
    found = [parts[piece] for piece in call.needs.queries.pieces(call.shards.rank)]
    found = found or [nothing(q, k, v, *call.captured)]
    out = torch.cat([part for part, _ in found], 2) if len(found) > 1 else found[0][0]
    lse = torch.cat([lse for _, lse in found], 2) if with_lse else None
    # where nothing that came is seen, what went still has a gradient that comes back
    return (out if got is None else tied(out, got)), lse
