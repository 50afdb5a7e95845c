"""Attention at several resolutions as a function of tensors, what it costs, and the order that makes patches blocks.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values, b tokens per
block; X, Y blocks of queries and keys, m chosen tiles, r children per side of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.attention.mra.refinement import choose_blocks, coarse_scores, rank_blocks, refine
from saccade.attention.mra.tiles import merge_blocks, to_tokens, tokens_per_block
from saccade.ops import masks
from saccade.ops.backends.blocksparse import blocksparse_attend
from saccade.ops.constants import at_home
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.selection import pool_blocks
from saccade.ops.sharding import in_parts


@in_parts
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
        released_ranking: see the paper's page; for two resolutions only, the second 1.
        return_map: also return which tiles of the first scale were cut.

    Returns:
        (B, H, N, E); with `return_map` also bool (B, H, X, Y).

    Raises:
        ValueError: if shapes or options do not fit, or the mask is of another kind.
    """
    B, N, M = q_BHND.shape[0], q_BHND.shape[2], k_BKMD.shape[2]
    pattern = Pattern.of(mask, B, N, M, crosses=N != M).only(("padding",), "MRA")
    out, chosen = attend_kept(
        q_BHND, k_BKMD, v_BKME, pattern.real_queries(B, N), pattern.real_keys(B),
        resolutions=resolutions, num_blocks=num_blocks,
        blocks_per_row=blocks_per_row, mode=mode, first_blocks=first_blocks, diagonal_blocks=diagonal_blocks,
        scale=scale, released_ranking=released_ranking,
    )  # fmt: skip
    return (out, chosen) if return_map else out


def attend_kept(
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
    """`mra_attend` after its mask: the output and which tiles of the first scale were cut."""
    _check(q, k, v, mode, first_blocks, diagonal_blocks)
    scales = scales_of(resolutions)
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
        tokens_per_block(valid, length, b, q.device) for valid, length in ((query_valid_BN, N), (key_valid_BM, M))
    )
    padded = query_valid_BN is not None or key_valid_BM is not None
    counts = None
    if budget[0] is None and padded:
        real = (query_count > 0).sum(-1).expand(B), (key_count > 0).sum(-1).expand(B)
        counts = (real[0] * per_row[0]).ceil().long().minimum(real[0] * real[1])
    total = math.ceil(per_row[0] * X) if budget[0] is None else int(budget[0])
    best, kept, top, threshold = choose_blocks(
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
            ranks = rank_blocks(
                qbar, kbar, factor, top, query_count, key_count, first_blocks, diagonal_blocks, padded, 0, X
            )
            coarse = coarse & (ranks.view(B, H, X, Y) < threshold[..., None, None])
        vbar = repeat_heads(pool_blocks(v, b, valid_BN=key_valid_BM), H)
        weight = None if key_valid_BM is None and M % b == 0 else key_count
        parts.append((b, *coarse_scores(qbar, kbar, vbar, coarse, weight, b, factor)))
    if scales[1:] == [1]:
        exact = masks.blocks(chosen, b)
        seen = exact if key_valid_BM is None else exact & masks.padding(key_valid_BM)
        with at_home(q):
            out, lse = blocksparse_attend(q, k, v, seen, block_size=b, scale=factor, return_lse=True)
    else:
        k, v = repeat_heads(k, H), repeat_heads(v, H)
        fine = refine(
            q, k, v, query_valid_BN, key_valid_BM, scales, budget, per_row, factor, mode, best, kept, top
        )  # fmt: skip
        parts += fine[:-1]
        out, lse = to_tokens(*fine[-1], N)
    for size, out_part, lse_part in parts:
        out, lse = merge_blocks(out, lse, size, out_part, lse_part)
    if query_valid_BN is not None:
        out = out.masked_fill(~query_valid_BN[:, None, :, None], 0.0)
    return out.to(q.dtype), chosen


def scales_of(resolutions: Sequence[int]) -> list[int]:
    """s_0 > s_1 > ..., checked."""
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

    Args:
        grid: (height, width) of the image in tokens.
        patch: (height, width) of a patch.

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
    which is what it amounts to where all tiles are chosen.

    Args:
        n, m: numbers of queries and keys; causal, offset: not read, as MRA is bidirectional.
        options: `resolutions`, `num_blocks` and `blocks_per_row`.

    Raises:
        ValueError: if the options do not fit together.
    """
    scales = scales_of(options["resolutions"])
    budget = _per_cut(options["num_blocks"], len(scales) - 1, "num_blocks")
    per_row = _per_cut(options["blocks_per_row"], len(scales) - 1, "blocks_per_row")
    total = available = float(-(-n // scales[0]) * -(-m // scales[0]))
    for cut, (size, finer) in enumerate(zip(scales, scales[1:])):
        number = math.ceil(per_row[cut] * -(-n // size)) if budget[cut] is None else budget[cut]
        available = min(available, number) * (size // finer) ** 2
        total += available
    return min(total, float(n * m))
