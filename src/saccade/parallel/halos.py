"""Functions of tokens and their neighbours on a sequence in parts: those at the edges of each piece are fetched.

Shape letters: B batch, N tokens of this rank, F features of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks
from saccade.ops.neighbours import expected
from saccade.ops.sharding import Layout, Needs, needs_of
from saccade.parallel.context import Shards
from saccade.parallel.dense import halo
from saccade.parallel.exchange import tied
from saccade.parallel.parts import Call


def neighbours_needed(layout: Layout, before: int, after: int) -> Needs:
    """The tokens beside each piece.

    Args:
        layout: who holds which tokens.
        before, after: how many.
    """
    return needs_of(masks.window(before, after), layout, layout, side_by_side=True)


@torch.compiler.disable
def with_neighbours(
    shards: Shards,
    function: Callable[..., Any],
    compute: Callable[[Tensor], Tensor],
    x: Tensor,
    before: int,
    after: int = 0,
    dim: int = 1,
) -> Tensor:
    """This rank's tokens of `saccade.ops.neighbours.with_neighbours`.

    Args:
        shards: the ranks.
        function: that.
        compute: the function of tokens with their neighbours.
        x: this rank's part.
        before, after, dim: as there.

    Raises:
        ValueError: as there.
    """
    dim, layout = dim % x.ndim, shards.layouts(x.shape[dim])[0]
    if before < 0 or after < 0:
        return function(compute, x, before, after, dim)  # says so
    tokens = x.movedim(dim, 1)
    x_B1NF = tokens.flatten(2)[:, None] if tokens.ndim > 2 else tokens[:, None, :, None]
    call = Call(shards, function, neighbours_needed(layout, before, after), {})
    held, got = halo(call, x_B1NF, x_B1NF[..., :0])
    outs = []
    for piece in layout.pieces(shards.rank):
        first, last = max(0, piece.start - before), min(layout.length, piece.stop + after)
        one = next(one for one in held if piece.start in one.run)
        near = one.keys[:, 0, first - one.run.start : last - one.run.start]
        near = F.pad(near, (0, 0, before - (piece.start - first), after - (last - piece.stop)))
        found = compute(near.unflatten(2, tokens.shape[2:]).movedim(1, dim) if tokens.ndim > 2 else near[..., 0])
        if found.shape[dim] != len(piece):
            raise ValueError(expected(len(piece), found.shape[dim]))
        outs.append(found)
    if not outs:  # more ranks than tokens
        shape = [*x.shape[:dim], before + 1 + after, *x.shape[dim + 1 :]]
        outs.append(compute(x.sum() + x.new_zeros(shape)).narrow(dim, 0, 0))
    out = torch.cat(outs, dim)
    return out if got is None else tied(out, got)
