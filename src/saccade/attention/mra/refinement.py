"""From coarse scores to finer ones: which blocks are refined, level after level.

Shape letters: B batch, H heads, N queries, C width of a mean, E width of values; X, Y blocks of queries and keys,
m chosen tiles, r children per side of a tile.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.attention.mra.tiles import sum_rows, tokens_per_block
from saccade.ops.attend import attend
from saccade.ops.selection import pool_blocks

#: block scores that are ranked at once; more are ranked in pieces, which bounds the memory
_RANKED = 2**22

_PRIOR, _PAD = 5e3, 1e4


@torch.no_grad()
def choose_blocks(
    qbar: Tensor,
    kbar: Tensor,
    factor: float,
    total: int,
    counts_B: Tensor | None,
    query_count: Tensor,
    key_count: Tensor,
    first: int,
    diagonal: int,
    padded: bool,
    released: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The `total` best tiles of each head: flat indices (B, H, m), which of them count, row maxima (B, H, X), and the
    value of the last chosen. Ranked in pieces of query blocks, the best so far against the next piece."""
    (B, H, X, _), Y = qbar.shape, kbar.shape[2]
    ordered = counts_B is not None
    step = max(1, min(X, max(_RANKED, 4 * B * H * total) // max(1, B * H * Y)))
    values = best = None
    tops = []
    absent = (key_count == 0)[:, None, None]
    for start in range(0, X, step):
        stop = min(start + step, X)
        scores = (qbar[:, :, start:stop] @ kbar.mT).mul_(factor)
        top = scores.masked_fill(absent, -math.inf) if padded and not released else scores
        tops.append(top.amax(-1).clamp(min=torch.finfo(scores.dtype).min))
        here = rank_blocks(
            qbar, kbar, factor, tops[-1], query_count, key_count, first, diagonal, padded, start, stop, scores
        )
        here, index = here.topk(min(total, here.shape[-1]), -1, sorted=ordered and stop == X and not start)
        index += start * Y
        if values is not None and best is not None:
            here, index = torch.cat([values, here], -1), torch.cat([best, index], -1)
            here, picked = here.topk(min(total, here.shape[-1]), -1, sorted=ordered and stop == X)
            index = index.gather(-1, picked)
        values, best = here, index
    assert values is not None and best is not None
    threshold = values.amin(-1) if values.shape[-1] else values.new_full((B, H), math.inf)
    kept = None
    if counts_B is not None:
        kept = torch.arange(best.shape[-1], device=best.device) < counts_B[:, None, None]
    return best, kept, torch.cat(tops, -1), threshold


def rank_blocks(
    qbar: Tensor,
    kbar: Tensor,
    factor: float,
    top_BHX: Tensor,
    query_count: Tensor,
    key_count: Tensor,
    first: int,
    diagonal: int,
    padded: bool,
    start: int,
    stop: int,
    scores: Tensor | None = None,
) -> Tensor:
    """What tiles of the query blocks `start` to `stop` are ranked by, (B, H, (stop - start) Y)."""
    scores = (qbar[:, :, start:stop] @ kbar.mT) * factor if scores is None else scores
    ranks = scores.detach() - top_BHX[..., None]
    if padded:
        absent = (query_count[:, start:stop, None] == 0) | (key_count[:, None] == 0)
        ranks = ranks - _PAD * absent[:, None].to(ranks.dtype)
    x = torch.arange(start, stop, device=ranks.device)[:, None]
    y = torch.arange(kbar.shape[2], device=ranks.device)
    if diagonal:
        ranks = ranks + _PRIOR * ((x - y).abs() <= diagonal // 2).to(ranks.dtype)
    if first:
        ranks = ranks + _PRIOR * (x < first).to(ranks.dtype) + _PRIOR * (y < first).to(ranks.dtype)
    return ranks.flatten(2)


def coarse_scores(
    qbar: Tensor, kbar: Tensor, vbar: Tensor, allowed: Tensor, key_count: Tensor | None, size: int, factor: float
) -> tuple[Tensor, Tensor]:
    """Attention over block means, block y counted c_y times (`size` where None): out (B, H, X, E), lse (B, H, X)."""
    if key_count is None:
        out, lse = attend(qbar, kbar, vbar, mask=allowed, scale=factor, return_lse=True)
        return out, lse + math.log(size)
    # log c_y as one more channel of the keys, against 1 in the queries
    weight = key_count.to(kbar.dtype).clamp(min=1).log()[:, None, :, None].expand(*kbar.shape[:3], 1)
    qbar, kbar = torch.cat([qbar * factor, torch.ones_like(qbar[..., :1])], -1), torch.cat([kbar, weight], -1)
    return attend(qbar, kbar, vbar, mask=allowed & (key_count > 0)[:, None, None], scale=1.0, return_lse=True)


def refine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_valid: Tensor | None,
    key_valid: Tensor | None,
    scales: list[int],
    budget: list[Any],
    per_row: list[Any],
    factor: float,
    mode: str,
    tiles: Tensor,
    kept: Tensor | None,
    top: Tensor,
) -> list[tuple[int, Tensor, Tensor]]:
    """The scales below the first, as lists of tiles: (scale, out, lse) of each, finest last.

    Each chosen tile is a small product of the means in it; the tiles of one row are added up with a common maximum.
    """
    B, H, N, _ = q.shape
    Y = -(-k.shape[2] // scales[0])
    x, y = tiles // Y, tiles % Y
    row_top = top.gather(2, x)
    parts = []
    for level in range(1, len(scales)):
        size, r = scales[level], scales[level - 1] // scales[level]
        X_here, Y_here = (-(-n // scales[0]) * (scales[0] // size) for n in (N, k.shape[2]))
        query = _in_tiles(pool_blocks(q, size, valid_BN=query_valid), X_here, r, x)
        key = _in_tiles(pool_blocks(k, size, valid_BN=key_valid), Y_here, r, y)
        value = _in_tiles(pool_blocks(v, size, valid_BN=key_valid), Y_here, r, y)
        count = tokens_per_block(key_valid, k.shape[2], size, q.device)
        count = F.pad(count, (0, Y_here - count.shape[1])).expand(B, -1).view(B, 1, -1, r).expand(-1, H, -1, -1)
        count = count.gather(2, y[..., None].expand(-1, -1, -1, r))
        scores = (query @ key.mT) * factor  # (B, H, m, r, r)
        absent = (count == 0)[..., None, :].expand_as(scores)
        if kept is not None:
            absent = absent | ~kept[..., None, None]
        if level < len(scales) - 1:
            ranks = (scores.detach() - row_top[..., None, None]).masked_fill(absent, -math.inf).flatten(2)
            blocks_B = (tokens_per_block(query_valid, N, size, q.device) > 0).sum(-1).expand(B)
            wanted = math.ceil(per_row[level] * -(-N // size)) if budget[level] is None else int(budget[level])
            values, picked = ranks.topk(min(wanted, ranks.shape[-1]), -1)
            next_kept = values > -math.inf
            if budget[level] is None:  # a sequence gets what it would get alone
                limit = (blocks_B * per_row[level]).ceil()[:, None, None]
                next_kept = next_kept & (torch.arange(values.shape[-1], device=q.device) < limit)
            parent, child_x, child_y = picked // (r * r), picked // r % r, picked % r
            left = torch.zeros_like(ranks, dtype=torch.bool).scatter_(2, picked, next_kept).view(scores.shape)
            absent = absent | left
        if mode == "full" or level == len(scales) - 1:
            logits = (scores + count.clamp(min=1).log()[..., None, :]).masked_fill(absent, -math.inf)
            parts.append((size, *sum_rows(logits, value, x, X_here)))
        if level < len(scales) - 1:
            row_top, kept = row_top.gather(2, parent), next_kept
            x, y = x.gather(2, parent) * r + child_x, y.gather(2, parent) * r + child_y
    return parts


def _in_tiles(means: Tensor, blocks: int, r: int, index: Tensor) -> Tensor:
    """The r means in each chosen tile, (B, H, m, r, C)."""
    means = F.pad(means, (0, 0, 0, blocks - means.shape[2])).unflatten(2, (-1, r))
    B, H, _, _, C = means.shape
    return means.gather(2, index[..., None, None].expand(B, H, -1, r, C))
