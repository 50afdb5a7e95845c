"""What a sequence in parts costs each rank, worked out without a rank: keys that are needed, states that are left.

Shape letters: B batch, H query heads, K key heads, D head dim of q and k, E head dim of v.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

from saccade.ops.masks import Mask
from saccade.ops.masks.runs import shared
from saccade.ops.planning import Parts, Problem, Share
from saccade.ops.score_mods import Modification
from saccade.ops.sharding.layout import Layout
from saccade.ops.sharding.needs import Needs, Tile, needs_of

#: blocks along a tile's side, at most, in which its density is counted
_GRAIN = 64

#: the density below which blocks of a tile are too large to tell it
_THIN = 0.2


def goes_round(needs: Needs, score: Any, score_mod: Any, normalize: Any) -> bool:
    """Keys are sent one part after another, a ring, and not all at once, a halo.

    That is where some rank needs more than a rank holds, of dot products under softmax, which can be put together from
    parts.

    Args:
        needs: who needs what.
        score, score_mod, normalize: of `saccade.attend`.
    """
    known = score_mod is None or isinstance(score_mod, Modification)
    return not needs.is_halo and known and score is None and is_softmax(normalize)


def is_softmax(normalize: Any) -> bool:
    """Whether a normaliser is the one whose parts have an LSE.

    Args:
        normalize: of `saccade.attend`.
    """
    return isinstance(normalize, str) and normalize == "softmax"


def parts_of(problem: Problem, mask: Mask | None, queries: Layout, keys: Layout, keys_have_grad: bool) -> Parts:
    """The forecast of a call of `attend`.

    Args:
        problem: the call on whole sequences.
        mask: of the whole, as an object; None where all see all.
        queries, keys: who holds them.
        keys_have_grad: keys or values have a gradient. Round a ring they come again for any gradient.
    """
    softmax = is_softmax(problem.normalize)
    needs = needs_of(mask, queries, keys, side_by_side=not softmax)
    ring = goes_round(needs, problem.score, problem.score_mod, problem.normalize)
    token = problem.B * problem.K * (problem.D + problem.E) * problem.dtype.itemsize
    pair = 2 * problem.B * problem.H * (problem.D + problem.E)
    flops = [int(pair * _pairs(needs, rank)) for rank in range(needs.ranks)]
    return parts_of_keys(needs, token, flops, problem.needs_grad if ring else keys_have_grad, ring=ring)


def parts_of_keys(needs: Needs, token: int, flops: Sequence[int], needs_grad: bool, *, ring: bool = False) -> Parts:
    """The forecast where each rank is sent the keys that it needs.

    Args:
        needs: who needs what.
        token: bytes of a token's keys and values.
        flops: of each rank.
        needs_grad: there is a backward pass.
        ring: part after part, and once more in the backward pass.
    """
    shares = []
    for rank in range(needs.ranks):
        sent, received = needs.sent(rank) * token, needs.received(rank) * token
        back = (0, 0)
        if needs_grad:  # gradients go home; round the ring, keys and values come once more
            back = (sent + received, received + sent) if ring else (received, sent)
        shares.append(Share(flops[rank], sent, received, *back))
    return Parts("ring" if ring else "halo" if needs.steps else "alone", tuple(shares))


def parts_of_states(left: int, flops: Sequence[int], needs_grad: bool) -> Parts:
    """The forecast of a recurrence: every rank is sent the states that the others leave behind.

    Args:
        left: bytes of what a rank leaves behind, of all its pieces.
        flops: of each rank.
        needs_grad: states have a gradient.
    """
    moved = (len(flops) - 1) * left
    back = moved if needs_grad else 0
    return Parts("states" if moved else "alone", tuple(Share(work, moved, moved, back, back) for work in flops))


def _pairs(needs: Needs, rank: int) -> float:
    """Pairs that a rank computes, by the blocks of its tiles; thin ones are looked at in strips of queries."""
    runs = [run for holder in range(needs.ranks) for run in needs.table[rank][holder]]
    total = 0.0
    for tile in needs.tiles(rank, runs):
        found = _in_blocks(needs, tile)
        if needs.mask is not None and found < _THIN * len(tile.queries) * len(tile.keys):
            step = ceil(len(tile.queries) / max(1, min(_GRAIN, len(tile.queries) // _GRAIN**2)))
            strips = (tile.queries[at : at + step] for at in range(0, len(tile.queries), step))
            n, m = needs.queries.length, needs.keys.length
            reached = ((strip, shared(needs.mask.reach(strip, n, m), [tile.keys])) for strip in strips)
            found = sum(_in_blocks(needs, Tile(strip, run)) for strip, seen in reached for run in seen)
        total += found
    return total


def _in_blocks(needs: Needs, tile: Tile) -> float:
    mask, (n, m) = needs.mask_of(tile), map(len, tile)
    return n * m * (1.0 if mask is None else mask.density(n, m, max(1, ceil(max(n, m) / _GRAIN))))
