"""MRA: the mathematics, as functions of tensors.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values, b tokens per
block; X, Y blocks of queries and keys, m chosen tiles, r children per side of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.backends.blocksparse import blocksparse_attend
from saccade.ops.constants import at_home
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.merge import merge
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.selection import pool_blocks

#: block scores that are ranked at once; more are ranked in pieces, which bounds the memory
_RANKED = 2**22


_PRIOR, _PAD = 5e3, 1e4


def mra_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    resolutions: Sequence[int] = (32, 1),
    num_blocks: int | Sequence[int] | None = None,
    blocks_per_row: float | Sequence[float] = 8,
    mode: Literal["full", "sparse"] = "full",
    first_blocks: int = 0,
    diagonal_blocks: int = 0,
    mask: GivenMask = None,
    scale: float | None = None,
    released_ranking: bool = False,
    return_map: bool = False,
) -> Any:
    """Bidirectional attention with the weights Ahat / D. All tiles chosen: dense softmax attention.

    Time O(m b^2 D + X Y D) per head, memory linear in N + M but for X Y bits of choice. Gradients are exact, through
    the block means too; none flow through the choice.

    Args:
        q_BHND, k_BKMD, v_BKME: K divides H; E may differ from D.
        resolutions: tokens per block, falling, each a multiple of the next; the last may be above 1.
        num_blocks: tiles cut into the next scale, per head, one number or one per cut; more than there are: all.
        blocks_per_row: where `num_blocks` is None, times the real blocks of the sequence; one number or one per cut.
        mode: "full", or "sparse": tiles of the last scale alone; a query block that has none gives 0.
        first_blocks, diagonal_blocks: chosen before all others, at the first scale; they are part of `num_blocks`.
        mask: bool (B, M), True = real token, or the same as a mask object. Where N = M the queries that are padding
            are left out of their blocks' means and give 0.
        scale: factor of the dot product, D ** -0.5 where None.
        released_ranking: see above; for two resolutions only, the second 1.
        return_map: also return which tiles of the first scale were cut.

    Returns:
        (B, H, N, E); with `return_map` also bool (B, H, X, Y).

    Raises:
        ValueError: if shapes or options do not fit, or the mask is of another kind.
    """
    B, N, M = q_BHND.shape[0], q_BHND.shape[2], k_BKMD.shape[2]
    pattern = Pattern.of(mask, B, N, M, crosses=N != M).only(("padding",), "MRA")
    out, chosen = _attend(
        q_BHND, k_BKMD, v_BKME, pattern.real_queries(B, N), pattern.real_keys(B),
        resolutions=resolutions, num_blocks=num_blocks,
        blocks_per_row=blocks_per_row, mode=mode, first_blocks=first_blocks, diagonal_blocks=diagonal_blocks,
        scale=scale, released_ranking=released_ranking,
    )  # fmt: skip
    return (out, chosen) if return_map else out


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_valid_BN: Tensor | None,
    key_valid_BM: Tensor | None,
    *,
    resolutions: Sequence[int],
    num_blocks: int | Sequence[int] | None,
    blocks_per_row: float | Sequence[float],
    mode: str,
    first_blocks: int,
    diagonal_blocks: int,
    scale: float | None,
    released_ranking: bool,
) -> tuple[Tensor, Tensor]:
    _check(q, k, v, mode, first_blocks, diagonal_blocks)
    scales = _scales(resolutions)
    budget = _per_cut(num_blocks, len(scales) - 1, "num_blocks")
    per_row = _per_cut(blocks_per_row, len(scales) - 1, "blocks_per_row")
    if released_ranking and scales[1:] != [1]:
        raise ValueError(f"released_ranking is for two resolutions, the second 1, got {tuple(scales)}")
    (B, H, N, D), M, b = q.shape, k.shape[2], scales[0]
    factor = D**-0.5 if scale is None else float(scale)
    X, Y = -(-N // b), -(-M // b)
    if 0 in (B, N, M):
        nothing = q.new_zeros(B, H, N, v.shape[3]) + 0 * (q.sum() + k.sum() + v.sum())
        return nothing, torch.zeros(B, H, X, Y, dtype=torch.bool, device=q.device)

    # rows of padding are 0, so that exact scores with them are finite whatever they hold
    if query_valid_BN is not None:
        q = q.masked_fill(~query_valid_BN[:, None, :, None], 0.0)
    if key_valid_BM is not None:
        k, v = (x.masked_fill(~key_valid_BM[:, None, :, None], 0.0) for x in (k, v))
    qbar = pool_blocks(q, b, valid_BN=query_valid_BN)
    kbar = repeat_heads(pool_blocks(k, b, valid_BN=key_valid_BM), H)
    query_count, key_count = (
        _counts(valid, length, b, q.device) for valid, length in ((query_valid_BN, N), (key_valid_BM, M))
    )
    padded = query_valid_BN is not None or key_valid_BM is not None
    counts = None
    if budget[0] is None and padded:
        real = (query_count > 0).sum(-1).expand(B), (key_count > 0).sum(-1).expand(B)
        counts = (real[0] * per_row[0]).ceil().long().minimum(real[0] * real[1])
    total = math.ceil(per_row[0] * X) if budget[0] is None else int(budget[0])
    best, kept, top, threshold = _choose(
        qbar, kbar, factor, min(total, X * Y), counts, query_count, key_count, first_blocks, diagonal_blocks,
        padded, released_ranking,
    )  # fmt: skip
    chosen = torch.zeros(B, H, X * Y + 1, dtype=torch.bool, device=q.device)
    chosen = chosen.scatter_(2, best if kept is None else best.masked_fill(~kept, X * Y), True)
    chosen = chosen[..., : X * Y].view(B, H, X, Y)

    parts = []  # (out, lse) of each scale, per block of that scale
    if mode == "full":
        coarse = ~chosen
        if released_ranking:
            ranks = _ranks(qbar, kbar, factor, top, query_count, key_count, first_blocks, diagonal_blocks, padded, 0, X)
            coarse = coarse & (ranks.view(B, H, X, Y) < threshold[..., None, None])
        vbar = repeat_heads(pool_blocks(v, b, valid_BN=key_valid_BM), H)
        weight = None if key_valid_BM is None and M % b == 0 else key_count
        parts.append((b, *_coarse(qbar, kbar, vbar, coarse, weight, b, factor)))
    if scales[1:] == [1]:
        exact = masks.blocks(chosen, b)
        seen = exact if key_valid_BM is None else exact & masks.padding(key_valid_BM)
        with at_home(q):
            out, lse = blocksparse_attend(q, k, v, seen, block_size=b, scale=factor, return_lse=True)
    else:
        k, v = repeat_heads(k, H), repeat_heads(v, H)
        fine = _refine(
            q, k, v, query_valid_BN, key_valid_BM, scales, budget, per_row, factor, mode, best, kept, top
        )  # fmt: skip
        parts += fine[:-1]
        out, lse = _to_tokens(*fine[-1], N)
    for size, out_part, lse_part in parts:
        out, lse = _merge_blocks(out, lse, size, out_part, lse_part)
    if query_valid_BN is not None:
        out = out.masked_fill(~query_valid_BN[:, None, :, None], 0.0)
    return out.to(q.dtype), chosen


@torch.no_grad()
def _choose(
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
        here = _ranks(
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


def _ranks(
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


def _coarse(
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


def _refine(
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
        count = _counts(key_valid, k.shape[2], size, q.device)
        count = F.pad(count, (0, Y_here - count.shape[1])).expand(B, -1).view(B, 1, -1, r).expand(-1, H, -1, -1)
        count = count.gather(2, y[..., None].expand(-1, -1, -1, r))
        scores = (query @ key.mT) * factor  # (B, H, m, r, r)
        absent = (count == 0)[..., None, :].expand_as(scores)
        if kept is not None:
            absent = absent | ~kept[..., None, None]
        if level < len(scales) - 1:
            ranks = (scores.detach() - row_top[..., None, None]).masked_fill(absent, -math.inf).flatten(2)
            blocks_B = (_counts(query_valid, N, size, q.device) > 0).sum(-1).expand(B)
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
            parts.append((size, *_sum_rows(logits, value, x, X_here)))
        if level < len(scales) - 1:
            row_top, kept = row_top.gather(2, parent), next_kept
            x, y = x.gather(2, parent) * r + child_x, y.gather(2, parent) * r + child_y
    return parts


def _in_tiles(means: Tensor, blocks: int, r: int, index: Tensor) -> Tensor:
    """The r means in each chosen tile, (B, H, m, r, C)."""
    means = F.pad(means, (0, 0, 0, blocks - means.shape[2])).unflatten(2, (-1, r))
    B, H, _, _, C = means.shape
    return means.gather(2, index[..., None, None].expand(B, H, -1, r, C))


def _sum_rows(logits: Tensor, value: Tensor, x: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Softmax over all tiles of a row: out (B, H, blocks, E), lse; 0 and -inf where there is none."""
    B, H, _, r, _ = logits.shape
    row = (x[..., None] * r + torch.arange(r, device=x.device)).flatten(2)
    with torch.no_grad():
        top = logits.new_full((B, H, blocks), -math.inf).scatter_reduce(2, row, logits.amax(-1).flatten(2), "amax")
        top = top.masked_fill(top == -math.inf, 0.0)
    weights = (logits - top.gather(2, row).view(B, H, -1, r)[..., None]).exp()
    total = logits.new_zeros(B, H, blocks).scatter_add(2, row, weights.sum(-1).flatten(2))
    mixed = (weights @ value).flatten(2, 3)
    out = mixed.new_zeros(B, H, blocks, mixed.shape[-1]).scatter_add(2, row[..., None].expand_as(mixed), mixed)
    none = total == 0
    safe = total.masked_fill(none, 1.0)
    return out / safe[..., None], (safe.log() + top).masked_fill(none, -math.inf)


def _to_tokens(size: int, out: Tensor, lse: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """What each block got, for each of its tokens."""
    if size == 1:
        return out[:, :, :N], lse[:, :, :N]
    return out.repeat_interleave(size, 2)[:, :, :N], lse.repeat_interleave(size, 2)[:, :, :N]


def _merge_blocks(out: Tensor, lse: Tensor, size: int, out_part: Tensor, lse_part: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` of tokens with blocks, the blocks' rows not copied where they are whole."""
    N, blocks = out.shape[2], out_part.shape[2]
    if size == 1 or blocks * size != N:
        return merge(out, lse, *_to_tokens(size, out_part, lse_part, N))
    out, lse = out.unflatten(2, (blocks, size)), lse.unflatten(2, (blocks, size))
    rows = out_part[:, :, :, None].to(out.dtype).expand(out.shape), lse_part[..., None].to(lse.dtype).expand(lse.shape)
    out, lse = merge(out, lse, *rows)
    return out.flatten(2, 3), lse.flatten(2, 3)


def _counts(valid: Tensor | None, length: int, size: int, device: torch.device) -> Tensor:
    """Real tokens of each block, (B or 1, blocks)."""
    if valid is None:
        return torch.arange(0, length, size, device=device).neg().add(length).clamp(max=size)[None]
    return F.pad(valid, (0, -length % size)).unflatten(1, (-1, size)).sum(2)


def _scales(resolutions: Sequence[int]) -> list[int]:
    scales = list(resolutions)
    fits = all(isinstance(s, int) and s >= 1 for s in scales)
    if len(scales) < 2 or not fits or any(a <= b or a % b for a, b in zip(scales, scales[1:])):
        raise ValueError(f"resolutions must fall, each a multiple of the next, such as (32, 1), got {resolutions}")
    return scales


def _per_cut(value: Any, cuts: int, name: str) -> list[Any]:
    numbers = [value] * cuts if value is None or isinstance(value, (int, float)) else list(value)
    if len(numbers) != cuts or any(number is not None and number < 0 for number in numbers):
        raise ValueError(f"{name} must be one number >= 0 or one per cut ({cuts}), got {value}")
    return numbers


def _check(q: Tensor, k: Tensor, v: Tensor, mode: str, first: int, diagonal: int) -> None:
    check_qkv(q, k, v)
    if mode not in ("full", "sparse"):
        raise ValueError(f"mode must be 'full' or 'sparse', got {mode!r}")
    if first < 0 or diagonal < 0:
        raise ValueError(f"first_blocks and diagonal_blocks must be at least 0, got {first} and {diagonal}")


def patch_order(grid: tuple[int, int], patch: tuple[int, int] = (4, 8)) -> Tensor:
    """Row-major tokens of an image, put in the order in which each patch is one block of consecutive tokens.

    Returns:
        int64 (height * width,): `x[:, order]` has the patches in a row, `y[:, order.argsort()]` undoes it.

    Raises:
        ValueError: if the patch does not divide the grid.
    """
    (height, width), (rows, columns) = grid, patch
    if min(height, width, rows, columns) < 1 or height % rows or width % columns:
        raise ValueError(f"the patch {tuple(patch)} must divide the grid, got {tuple(grid)}")
    index = torch.arange(height * width).view(height // rows, rows, width // columns, columns)
    return index.transpose(1, 2).flatten()


def mra_pairs(n: int, m: int, causal: bool, offset: int, options: Mapping[str, Any]) -> float:
    """Scores that `mra_attend` computes per head: exact pairs of the last scale and pairs of block means; at most n m,
    which is what it amounts to where all tiles are chosen."""
    scales = _scales(options["resolutions"])
    budget = _per_cut(options["num_blocks"], len(scales) - 1, "num_blocks")
    per_row = _per_cut(options["blocks_per_row"], len(scales) - 1, "blocks_per_row")
    total = available = float(-(-n // scales[0]) * -(-m // scales[0]))
    for cut, (size, finer) in enumerate(zip(scales, scales[1:])):
        number = math.ceil(per_row[cut] * -(-n // size)) if budget[cut] is None else budget[cut]
        available = min(available, number) * (size // finer) ** 2
        total += available
    return min(total, float(n * m))
