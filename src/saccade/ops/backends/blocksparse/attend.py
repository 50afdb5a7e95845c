"""Block-sparse attention as it is called with a mask, a block map or a bias per block.

    out_i = sum_j P_ij v_j,  P = softmax_j(scale * q_i . k_j + bias of the block of (i, j))

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v; n, m
blocks of queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal, overload

import torch
from torch import Tensor

from saccade.ops import masks
from saccade.ops.backends.blocksparse.operator import attend_blocks_of
from saccade.ops.export import exporting, weigh
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import FULL, Mask
from saccade.ops.masks.block_states import size_pair
from saccade.ops.planning import PLANNING_BLOCK, nothing, own_block_size


def _every_block(N: int, M: int, block_size: tuple[int, int], device: torch.device) -> Tensor:
    shape = (1, 1, ceil(N / block_size[0]), ceil(M / block_size[1]))
    return torch.full(shape, FULL, dtype=torch.int8, device=device)


@overload
def blocksparse_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    mask: Mask | Tensor | None,
    *,
    block_size: int | Sequence[int] | None = None,
    block_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    memory_mb: float = 64.0,
) -> Tensor: ...


@overload
def blocksparse_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    mask: Mask | Tensor | None,
    *,
    block_size: int | Sequence[int] | None = None,
    block_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    memory_mb: float = 64.0,
) -> tuple[Tensor, Tensor]: ...


def blocksparse_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    mask: Mask | Tensor | None,
    *,
    block_size: int | Sequence[int] | None = None,
    block_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    memory_mb: float = 64.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_i = sum_j P_ij v_j,  P = softmax_j(scale * q_i . k_j + bias of the block of (i, j)), over what `mask` allows.

    Work and time are proportional to the blocks that the mask keeps; the elementwise mask is evaluated only in blocks
    that it keeps in part. Gradients reach q, k, v and the bias, from the output and from the LSE. A query that may
    attend to nothing gives zeros and LSE -inf.

    Args:
        q_BHND: queries.
        k_BKMD: keys; K divides H.
        v_BKME: values; E may differ from D.
        mask: a mask of `saccade.masks`; or a bool block map (B or 1, H or 1, n, m), True = the block is attended,
            with `block_size`; or None for all blocks.
        block_size: tokens per block, an int or (query, key), 1 to 4096. Default: the mask's own, or else 64.
        block_bias: added to all scores of a block, (B or 1, H or 1, n, m); -inf leaves the block out.
        scale: D ** -0.5 where None.
        return_lse: also return the natural log of the sum of the exponentials, (B, H, N), float32 (float64 for double).
        memory_mb: bound of the working buffers, in MiB.

    Returns:
        out (B, H, N, E), or (out, lse).

    Raises:
        ValueError: if shapes do not fit each other or the blocks.
    """
    B, H, N, D = q_BHND.shape
    K, M = k_BKMD.shape[1:3]
    if K == 0 or H % K:
        raise ValueError(f"the key heads must divide the query heads ({H}), got {K}")
    if k_BKMD.shape != (B, K, M, D) or v_BKME.shape[:3] != (B, K, M):
        raise ValueError(
            f"query, key and value do not fit: {tuple(q_BHND.shape)}, {tuple(k_BKMD.shape)}, {tuple(v_BKME.shape)}"
        )
    if memory_mb <= 0:
        raise ValueError(f"memory_mb must be positive, got {memory_mb}")
    if block_size is None:
        if isinstance(mask, Tensor):
            raise ValueError("a block map needs block_size")
        own = own_block_size(mask)
        size = own or (PLANNING_BLOCK, PLANNING_BLOCK)
    else:
        size = size_pair(block_size, "block_size")
        if max(size) > 4096:
            raise ValueError(f"block_size must be between 1 and 4096, got {block_size}")
    if isinstance(mask, Tensor):
        mask = masks.blocks(mask, size)
    if exporting():
        both = _all_pairs(q_BHND, k_BKMD, v_BKME, mask, size, block_bias, D**-0.5 if scale is None else scale)
        return both if return_lse else both[0]
    n, m = ceil(N / size[0]), ceil(M / size[1])
    if mask is None:
        states = _every_block(N, M, size, q_BHND.device)
    else:
        if mask.batch not in (1, B) or mask.heads not in (1, H):
            raise ValueError(f"mask is for {mask.batch} batch rows and {mask.heads} heads, got {B} and {H}")
        mask.check(N, M)
        states = mask.block_map(N, M, size, q_BHND.device)
    if block_bias is not None:
        shape = tuple(block_bias.shape)
        if block_bias.ndim != 4 or shape[0] not in (1, B) or shape[1] not in (1, H) or shape[2:] != (n, m):
            raise ValueError(f"block_bias must have shape ({B} or 1, {H} or 1, {n}, {m}), got {shape}")
        left_out = block_bias.detach() == float("-inf")
        states = states * ~left_out
        block_bias = block_bias.masked_fill(left_out, 0.0)
    if 0 in (B, H, N, M):
        found = nothing(q_BHND, k_BKMD, v_BKME)
        return found if return_lse else found[0]
    scale = D**-0.5 if scale is None else float(scale)
    out, lse = attend_blocks_of(q_BHND, k_BKMD, v_BKME, mask, states, size, block_bias, scale, return_lse, memory_mb)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _all_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    block_size: tuple[int, int],
    block_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    scores = (q * scale) @ k.mT
    if block_bias is not None:
        over_keys = block_bias.repeat_interleave(block_size[1], 3)[..., : k.shape[2]]
        scores = scores + over_keys.repeat_interleave(block_size[0], 2)[:, :, : q.shape[2]]
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(q.shape[2], k.shape[2], q.device), float("-inf"))
    return weigh(scores, v)
