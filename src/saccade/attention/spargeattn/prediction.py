"""Which blocks are worth it, predicted from the means of blocks whose tokens resemble each other.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim; n, m blocks of queries and keys.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.heads import check_qkv
from saccade.ops.selection import (
    PerHead,
    block_causal,
    block_sparsity,
    leading_blocks,
    one_per_head,
    pool_blocks,
    top_blocks,
)

LOG2E = 1 / math.log(2)


@torch.no_grad()
def sparge_block_map(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    *,
    causal: bool = False,
    similarity_threshold: PerHead | None = None,
    cdf_threshold: PerHead | None = None,
    top_k: PerHead | None = None,
    attention_sink: bool = False,
    sinks: int = 0,
    block_q: int = 128,
    block_k: int = 64,
    scale: float | None = None,
    short_blocks: Literal["measure", "keep"] = "measure",
) -> Tensor:
    """Which blocks matter, from the means of q and of (smoothed) k: bool (B, H, ceil(N / block_q), ceil(M / block_k)).

    Time O(N M D / (block_q block_k) + (N + M) D) per head.

    Args:
        q_BHND, k_BKMD: queries, and keys, smoothed or not; K divides H.
        causal: leave out blocks that lie strictly in the future of their query block.
        similarity_threshold: theta; 0.6 where None, or -0.1 (every block counts as similar) with `top_k`. At 1 or more
            all blocks are kept, at -1 or less none by this rule.
        cdf_threshold: tau, 0.98 where None.
        top_k: instead of tau, the share of all key blocks that each row keeps (0 to 1), at least one.
        attention_sink: always keep the first key block.
        sinks: always keep the key blocks of so many first tokens.
        block_q, block_k: tokens per block.
        scale: of the block scores, D ** -0.5 where None.
        short_blocks: "measure" the self-similarity of a short last block on its tokens, or always "keep" it, as the
            authors' code does.

    Raises:
        ValueError: if shapes or thresholds do not fit.
    """
    check_qkv(q_BHND, k_BKMD, k_BKMD)
    H, N, D = q_BHND.shape[1:]
    K, M = k_BKMD.shape[1:3]
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q and block_k must be at least 1, got {block_q} and {block_k}")
    if top_k is not None and cdf_threshold is not None:
        raise ValueError("either cdf_threshold or top_k decides how many blocks are kept, got both")
    if short_blocks not in ("measure", "keep"):
        raise ValueError(f"short_blocks must be 'measure' or 'keep', got {short_blocks!r}")
    q_BHnD, similarity_BHn = block_statistics(q_BHND, block_q)
    k_BHmD, similarity_BHm = (x.repeat_interleave(H // K, 1) for x in block_statistics(k_BKMD, block_k))
    n, m = q_BHnD.shape[2], k_BHmD.shape[2]
    past = block_causal(n, m, block_q, block_k, device=q_BHND.device) if causal else None
    return map_of_statistics(
        q_BHnD, similarity_BHn, k_BHmD, similarity_BHm, past, (N // block_q, M // block_k),
        similarity_threshold=similarity_threshold, cdf_threshold=cdf_threshold, top_k=top_k,
        attention_sink=attention_sink, sinks=sinks, block_k=block_k, scale=D**-0.5 if scale is None else scale,
        short_blocks=short_blocks,
    )  # fmt: skip


def map_of_statistics(
    q_BHnD: Tensor,
    similarity_BHn: Tensor,
    k_BHmD: Tensor,
    similarity_BHm: Tensor,
    past: Tensor | None,
    short: tuple[int, int],
    *,
    similarity_threshold: PerHead | None = None,
    cdf_threshold: PerHead | None = None,
    top_k: PerHead | None = None,
    attention_sink: bool = False,
    sinks: int = 0,
    block_k: int = 64,
    scale: float,
    short_blocks: Literal["measure", "keep"] = "measure",
) -> Tensor:
    """`sparge_block_map` from what it reads off the blocks; the queries' may be some of the rows.

    Args:
        q_BHnD, similarity_BHn, k_BHmD, similarity_BHm: mean and self-similarity of each block, by query head.
        past: (n, m), blocks that do not lie strictly in the future; all where None.
        short: the first block of queries, and of keys, that is not full.
        similarity_threshold, cdf_threshold, top_k, attention_sink, sinks, block_k, short_blocks: as there.
        scale: of the block scores.

    Raises:
        ValueError: if thresholds do not fit.
    """
    (B, H, n, _), m, device = q_BHnD.shape, k_BHmD.shape[2], q_BHnD.device
    default = 0.6 if top_k is None else -0.1
    theta = one_per_head(
        default if similarity_threshold is None else similarity_threshold, "similarity_threshold", H, device
    )
    if top_k is None:
        tau = one_per_head(0.98 if cdf_threshold is None else cdf_threshold, "cdf_threshold", H, device, 0.0)
    else:
        fraction = one_per_head(top_k, "top_k", H, device, 0.0, 1.0)
    if 0 in (B, n, m):
        return torch.ones(B, H, n, m, dtype=torch.bool, device=device)
    similar_BHn, similar_BHm = similarity_BHn > theta[:, None], similarity_BHm > theta[:, None]
    if short_blocks == "keep":
        similar_BHn[..., max(0, short[0]) :] = False
        similar_BHm[..., short[1] :] = False

    scores = q_BHnD @ k_BHmD.mT * scale
    absent = ~similar_BHm[:, :, None]
    if past is not None:
        absent = absent | ~past
    # a row that has no candidate at all is NaN here, as in the authors' code; its blocks are kept by the next rules
    share = scores.masked_fill(absent, float("-inf")).softmax(-1)
    if top_k is None:
        keep = top_blocks(share, p=tau[:, None, None])
    else:
        count = (fraction.double() * m).floor().long().clamp(min=1)
        keep = top_blocks(share, at_least=count[:, None, None])
    keep = keep | ~similar_BHm[:, :, None] | ~similar_BHn[..., None]
    if past is not None:
        keep = keep & past
    if first_blocks := max(int(attention_sink), leading_blocks(sinks, block_k)):
        keep[..., :first_blocks] = True if past is None else past[..., :first_blocks]
    return keep


def sparge_sparsity(keep_BHnm: Tensor, *, causal: bool = False, block_q: int = 128, block_k: int = 64) -> Tensor:
    """Share of the blocks left out, (B, H); under a causal mask, of those that are not wholly in the future.

    Args:
        keep_BHnm: the map of `sparge_block_map`.
        causal, block_q, block_k: what it was made with.
    """
    n, m = keep_BHnm.shape[2:]
    return block_sparsity(keep_BHnm, block_causal(n, m, block_q, block_k, device=keep_BHnm.device) if causal else None)


def self_similarity(x_BHND: Tensor, block_size: int) -> Tensor:
    """Mean of all entries of X X^T over each block's unit rows, (B, H, blocks), fp32: 1 where all point one way.

    Args:
        x_BHND: queries or keys.
        block_size: tokens per block; the last block may be short.
    """
    return block_statistics(x_BHND, block_size)[1]


def block_statistics(x_BHND: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Mean (B, H, n, D) and self-similarity (B, H, n) of each block's tokens."""
    x = x_BHND.float()
    mean_BHnD = pool_blocks(x, size)
    length_BHN1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
    # a copy of our own is divided where it lies
    unit = x / length_BHN1 if x is x_BHND or x.requires_grad else x.div_(length_BHN1)
    return mean_BHnD, pool_blocks(unit, size).square().sum(-1)


def cover(keep_BHnm: Tensor, block_q: int, block_k: int, first: int = 0) -> Tensor:
    """Keep the first query's own block wherever it sees none of the kept ones; the rows begin at `first`."""
    n, m = keep_BHnm.shape[2:]
    own_n = torch.arange(first, first + n, device=keep_BHnm.device) * block_q // block_k
    block_m = torch.arange(m, device=keep_BHnm.device)
    blind = ~(keep_BHnm & (block_m <= own_n[:, None])).any(-1, keepdim=True)
    return keep_BHnm | (blind & (block_m == own_n[:, None]))


def int8(x_BHND: Tensor, block_size: int) -> Tensor:
    """To INT8 and back: scale = max|x| / 127 + 1e-7 per block, half away from zero."""
    N = x_BHND.shape[2]
    blocks = F.pad(x_BHND, (0, 0, 0, -N % block_size)).unflatten(2, (-1, block_size))
    scale = blocks.abs().amax((3, 4), keepdim=True) / 127 + 1e-7
    return ((blocks / scale + 0.5 * blocks.sign()).trunc() * scale).flatten(2, 3)[:, :, :N]
