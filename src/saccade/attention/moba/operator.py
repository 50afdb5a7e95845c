"""The choice of blocks and the attention over them, as functions of tensors; the last token's row; the definition.

Shape letters: B batch, H query heads, K key heads, N queries, M tokens, D head dim, E width of values, S tokens per
block, n or m blocks, L = n S, j = top_k - 1 chosen blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.routed import block_layout, routed_attend
from saccade.ops.selection import leading_blocks
from saccade.ops.sharding import in_parts

#: bytes of scores per piece of the gate, so that a piece stays in cache
_GATE_PIECE = 4 * 2**20


@in_parts
def moba_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    block_size: int = 512,
    top_k: int = 3,
    sinks: int = 0,
    scale: float | None = None,
    mask: GivenMask = None,
) -> Tensor:
    """Causal attention of each query over its own block and its `top_k - 1` best past blocks, by query head.

    Time O(N n D + N top_k S D) per head, memory linear in N; no N x N tensor. Gradients are exact; none flow through
    the choice. With `top_k` >= the number of blocks it is full causal attention.

    Args:
        q_BHND: queries, the last N of the M tokens.
        k_BKMD, v_BKME: keys and values; K divides H, E may differ from D.
        block_size: S.
        top_k: blocks per query, its own counted; at least 1.
        sinks: first tokens of a sequence whose blocks are chosen before others.
        scale: factor of the dot product, D ** -0.5 where None; not applied in the gate.
        mask: bool (B, M), True = real token (left or right padding); `masks.documents(ids)` or `cu_seqlens` for
            packed sequences; or both, combined with `&`. Blocks are counted from each sequence's first real token.
            Queries that are padding give zeros.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: if `block_size` or `top_k` is below 1, `sinks` below 0, N > M, or the mask is of another kind.
    """
    N, M = _check(q_BHND, k_BKMD, v_BKME, block_size, top_k)
    first_blocks = leading_blocks(sinks, block_size)
    pattern = Pattern.of(mask, q_BHND.shape[0], N, M, causal=True, offset=M - N)
    ids_BM = pattern.only(("padding", "documents"), "MoBA").sequence_ids(q_BHND.shape[0], M)
    n = -(-M // block_size)
    if ids_BM is None and top_k >= n:
        return attend(q_BHND, k_BKMD, v_BKME, mask=masks.causal(M - N), scale=scale)
    if 0 in (q_BHND.shape[0], N):
        return attend(q_BHND, k_BKMD, v_BKME, mask=masks.causal(M - N), scale=scale)
    if N == 1 and M > 1:
        return attend_last(q_BHND, k_BKMD, v_BKME, None, block_size, top_k, scale, ids_BM, first_blocks)

    if ids_BM is None:
        layout, first = None, (M - N) // block_size
        front, back = M - N - first * block_size, n * block_size - M
        q, k, v = q_BHND, k_BKMD, v_BKME
        if front or back:  # else it would be copied
            q, k, v = F.pad(q, (0, 0, front, back)), F.pad(k, (0, 0, 0, back)), F.pad(v, (0, 0, 0, back))
    else:
        layout, first = block_layout(ids_BM, block_size, blocks=n if pattern.ids_BM is None else None), 0
        q, k, v = layout.align(q_BHND, first=M - N), layout.align(k_BKMD), layout.align(v_BKME)
    chosen = moba_route(
        q,
        k,
        block_size=block_size,
        top_k=top_k,
        first_block=first,
        first_blocks=first_blocks,
        start_Bn=None if layout is None else layout.start_Bn,
    )
    out, _ = routed_attend(q, k, v, chosen, block_size, scale=scale)
    if layout is None:
        return out[:, :, front : front + N]
    return layout.restore(out, first=M - N)


def moba_pairs(n: int, m: int, causal: bool, offset: int, options: Mapping[str, Any]) -> float:
    """Pairs that `moba_attend` computes per head: token t has its own block up to itself, and top_k - 1 of the whole
    blocks before it.

    Args:
        n: tokens; m, causal, offset: not read, as MoBA is causal self-attention.
        options: `block_size` and `top_k`.
    """
    size, most = options["block_size"], options["top_k"] - 1
    whole, rest = divmod(n, size)
    few = min(whole, most)  # blocks whose tokens have fewer before them than they may choose
    own = whole * (size * (size + 1) // 2) + rest * (rest + 1) // 2
    chosen = size * (few * (few - 1) // 2 + (whole - few) * most) + rest * few
    return float(own + size * chosen)


@torch.no_grad()
def moba_route(
    q_BHLD: Tensor,
    k_BKMD: Tensor | None = None,
    *,
    block_size: int,
    top_k: int,
    first_block: int = 0,
    first_blocks: int = 0,
    start_Bn: Tensor | None = None,
    means_BKmD: Tensor | None = None,
) -> Tensor:
    """The past blocks of each query: int64 (B, H, L, min(top_k - 1, n - 1)), -1 where there are fewer.

    Args:
        q_BHLD: queries in whole blocks, from block `first_block` on.
        k_BKMD: keys in whole blocks; not read where `means_BKmD` is given.
        block_size, top_k: `moba_attend`'s.
        first_block: where the queries begin.
        first_blocks: of a sequence, so many are chosen before others.
        start_Bn: first block of each block's own sequence; 0 where None.
        means_BKmD: the mean key of each block, fp32, which stand for the keys.

    Raises:
        ValueError: if there are neither keys nor means.
    """
    B, H, L, D = q_BHLD.shape
    if means_BKmD is None:
        if k_BKMD is None:
            raise ValueError("moba_route needs keys, or the means of their blocks")
        means_BKmD = k_BKMD.unflatten(2, (-1, block_size)).mean(3, dtype=torch.float32)
    K, n = means_BKmD.shape[1:3]
    last_block = first_block + L // block_size
    keep = min(top_k, n) - 1
    chosen = torch.full((B, H, L, keep), -1, dtype=torch.long, device=q_BHLD.device)
    if keep <= 0:
        return chosen
    step = max(1, _GATE_PIECE // (4 * B * H * n * block_size))
    for first in range(first_block, last_block, step):
        last = min(first + step, last_block)
        here = slice((first - first_block) * block_size, (last - first_block) * block_size)
        past = last - 1  # blocks that are past for some query of this piece
        if past == 0:
            continue
        q = q_BHLD[:, :, here].float().reshape(B, K, -1, D)
        scores = (q @ means_BKmD[:, :, :past].mT).view(B, H, last - first, block_size, past)
        block, candidate = torch.arange(first, last, device=q.device), torch.arange(past, device=q.device)
        absent = candidate >= block[:, None]
        if start_Bn is not None:
            absent = absent | (candidate < start_Bn[:, first:last, None])
            absent = absent[:, None]
        if first_blocks:
            start = 0 if start_Bn is None else start_Bn[:, None, first:last, None]
            scores.masked_fill_((candidate < start + first_blocks)[..., None, :], float("inf"))
        scores.masked_fill_(absent[..., None, :], float("-inf"))
        best = _top(scores.flatten(2, 3), min(keep, past))
        chosen[:, :, here, : best.shape[-1]] = best
    return chosen


def _top(scores: Tensor, keep: int) -> Tensor:
    """Indices of the `keep` largest of the last axis, -1 for -inf. Overwrites the scores."""
    if keep > 4:
        values, best = scores.topk(keep, -1)
        return best.masked_fill_(values == float("-inf"), -1)
    # one maximum after another is several times quicker than topk for a few
    picks = [torch.empty_like(scores[..., :0], dtype=torch.long)]
    for _ in range(keep):
        value, index = scores.max(-1, keepdim=True)
        picks.append(index.masked_fill(value == float("-inf"), -1))
        scores.scatter_(-1, index, float("-inf"))
    return torch.cat(picks, -1)


def moba_attend_reference(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    *,
    block_size: int,
    top_k: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, line by line, for one sequence per batch row: the oracle of the tests. Quadratic.

    Args:
        q_BHND, k_BHND, v_BHNE, block_size, top_k, scale: `moba_attend`'s; as many queries as keys.

    Returns:
        out (B, H, N, E), and the chosen blocks (B, H, N, n) as bool, before the causal mask.
    """
    N = q_BHND.shape[2]
    k_BHND, v_BHNE = (repeat_heads(x, q_BHND.shape[1]) for x in (k_BHND, v_BHNE))
    n = -(-N // block_size)
    own_N = torch.arange(N, device=q_BHND.device) // block_size
    block_n = torch.arange(n, device=q_BHND.device)
    with torch.no_grad():
        means = torch.stack([part.float().mean(2) for part in k_BHND.split(block_size, 2)], 2)
        gate = q_BHND.float() @ means.mT
        gate = gate.masked_fill(block_n > own_N[:, None], float("-inf"))
        gate = gate.masked_fill(block_n == own_N[:, None], float("inf"))
        selected = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, gate.topk(min(top_k, n), -1).indices, True)
    allowed = selected.repeat_interleave(block_size, -1)[..., :N].tril()
    return attend(q_BHND, k_BHND, v_BHNE, mask=allowed, scale=scale, backend="reference"), selected


def attend_last(
    q_BH1D: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    means_BKnD: Tensor | None,
    block_size: int,
    top_k: int,
    scale: float | None,
    ids_BM: Tensor | None = None,
    first_blocks: int = 0,
) -> Tensor:
    """The last token's row, from the keys of its own and its chosen blocks alone."""
    B, H, _, D = q_BH1D.shape
    K, M = k_BKMD.shape[1:3]
    device = q_BH1D.device
    if ids_BM is None:
        n = (M - 1) // block_size
        own_B1 = torch.full((B, 1), n, device=device)
        start_B1 = torch.zeros_like(own_B1)
        if means_BKnD is None:
            means_BKnD = k_BKMD[:, :, : n * block_size].unflatten(2, (n, block_size)).mean(3, dtype=torch.float32)
        source_BL = torch.arange(n * block_size + block_size, device=device).expand(B, -1)
    else:
        layout = block_layout(ids_BM, block_size)
        means_BKnD = layout.align(k_BKMD).unflatten(2, (-1, block_size)).mean(3, dtype=torch.float32)
        n = means_BKnD.shape[2]
        # a last token of no sequence reads any block; its row is set to 0 at the end
        own_B1 = (layout.place_BN[:, -1:] // block_size).clamp(max=n - 1)
        start_B1 = layout.start_Bn.gather(1, own_B1)
        source_BL = layout.source_BL
    with torch.no_grad():
        scores = (q_BH1D.float().view(B, K, H // K, D) @ means_BKnD[:, :, :n].mT).view(B, H, n)
        block = torch.arange(n, device=device)
        absent = (block >= own_B1) | (block < start_B1)
        scores = scores.masked_fill((block < start_B1 + first_blocks)[:, None], float("inf"))
        scores = scores.masked_fill(absent[:, None], float("-inf"))
        chosen_BHj = _top(scores, min(top_k - 1, n))
        blocks_BHj = torch.cat([chosen_BHj, own_B1[:, None].expand(B, H, 1)], -1)
        places = blocks_BHj.clamp(min=0)[..., None] * block_size + torch.arange(block_size, device=device)
        tokens = source_BL[:, None].expand(B, H, -1).gather(2, places.flatten(2))
        real = (tokens < M) & (blocks_BHj >= 0).repeat_interleave(block_size, -1)
        if ids_BM is not None:
            real = real & (ids_BM[:, -1] >= 0)[:, None, None]
        tokens = tokens.clamp(max=M - 1)
    row = torch.arange(B, device=device)[:, None, None]
    head = (torch.arange(H, device=device) // (H // K))[:, None]
    return attend(q_BH1D, k_BKMD[row, head, tokens], v_BKME[row, head, tokens], mask=real[:, :, None], scale=scale)


def _check(q: Tensor, k: Tensor, v: Tensor, block_size: int, top_k: int) -> tuple[int, int]:
    check_qkv(q, k, v, tokens="last")
    if not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be an integer of at least 1, got {block_size}")
    if not isinstance(top_k, int) or top_k < 1:
        raise ValueError(f"top_k must be an integer of at least 1, got {top_k}")
    return q.shape[2], k.shape[2]
