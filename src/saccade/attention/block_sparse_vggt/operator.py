"""Which blocks of patches see each other, and the attention over frames that keeps to it, as functions of tensors.

Shape letters: B batch, H query heads, K key heads, N tokens of all frames, F frames, P tokens per frame, S special
tokens per frame, D head dim, E width of values, T patches of all frames; n, m blocks of queries and keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.masks.kept_blocks import KeptBlocks
from saccade.ops.selection import PerHead, one_per_head, pool_blocks, top_blocks
from saccade.ops.sharding import in_parts


@in_parts
def block_sparse_vggt_attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    *,
    frames: int = 1,
    special_tokens: int = 5,
    cdf_threshold: PerHead | None = None,
    sparse_ratio: float | None = None,
    top_k: int | None = None,
    block_q: int = 128,
    block_k: int = 64,
    pool: Literal["mean", "max"] = "mean",
    order: Tensor | None = None,
    packed: bool = False,
    causal: bool = False,
    scale: float | None = None,
    return_map: bool = False,
) -> Any:
    """Bidirectional attention over frames: dense from and to special tokens, block-sparse among patches.

    Gradients flow through the kept blocks, none through the choice. Memory is linear in N.

    Args:
        q_BHND, k_BKND, v_BKNE: tokens frame by frame, special ones first; K divides H, E may differ from D.
        frames: F, a divisor of N.
        special_tokens: S. Where a frame has no more tokens than that, all are special and all is dense.
        cdf_threshold, sparse_ratio, top_k, block_q, block_k, pool: see `vggt_block_map`.
        order: a permutation of a frame's patches, in which they are cut into blocks: `hilbert_order((rows, columns))`.
        packed: special keys share a block with the last patches, as in the authors' kernel.
        causal: must be False.
        scale: factor of the dot product, D ** -0.5 where None.
        return_map: also return who attends to whom, as a `FrameBlocks` mask; its `keep_BHnm` are the blocks.

    Returns:
        out (B, H, N, E); with `return_map` also the mask.

    Raises:
        ValueError: if shapes or options do not fit, or `causal` is True.

    >>> q = k = v = torch.randn(1, 2, 2 * (5 + 64), 16)
    >>> out, kept = block_sparse_vggt_attend(q, k, v, frames=2, top_k=2, block_q=16, block_k=16, return_map=True)
    >>> out.shape, kept.keep_BHnm.sum(-1).unique().tolist()
    (torch.Size([1, 2, 138, 16]), [3])
    """
    if causal:
        raise ValueError("global attention over frames is bidirectional, got causal=True")
    check_qkv(q_BHND, k_BKND, v_BKNE, tokens="same")
    N = q_BHND.shape[2]
    if frames < 1 or N % frames:
        raise ValueError(f"frames must divide the number of tokens ({N}), got {frames}")
    if special_tokens < 0:
        raise ValueError(f"special_tokens must not be negative, got {special_tokens}")
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q and block_k must be at least 1, got {block_q} and {block_k}")
    patch_T, special_s = places(frames, N // frames, special_tokens, order, q_BHND.device)
    patches = patch_T.shape[0]
    # special keys begin a block of their own, after rows that are masked where the last block of patches is short
    gap = 0 if packed or not special_s.shape[0] else -patches % block_k
    source = torch.cat([patch_T, patch_T[:1].expand(gap), special_s])
    q_patch, keys = q_BHND.index_select(2, patch_T), k_BKND.index_select(2, source)
    keep_BHnm = vggt_block_map(
        q_patch,
        keys[:, :, :patches],
        cdf_threshold=cdf_threshold,
        sparse_ratio=sparse_ratio,
        top_k=top_k,
        block_q=block_q,
        block_k=block_k,
        pool=pool,
        scale=scale,
    )
    keep_BHnm = F.pad(keep_BHnm, (0, -(-source.shape[0] // block_k) - keep_BHnm.shape[3]), value=True)
    out = attend(q_BHND.index_select(2, special_s), k_BKND, v_BKNE, scale=scale)
    if patches:
        pattern: Mask = masks.blocks(keep_BHnm, (block_q, block_k))
        if gap:
            place = torch.arange(source.shape[0], device=source.device)
            pattern = pattern & masks.padding(((place < patches) | (place >= patches + gap))[None])
        out_patch = attend(q_patch, keys, v_BKNE.index_select(2, source), mask=pattern, scale=scale)
        out = torch.cat([out_patch, out], 2).index_select(2, torch.cat([patch_T, special_s]).argsort())
    if not return_map:
        return out
    place_N = torch.cat([patch_T, special_s]).argsort()
    place_N = torch.where(place_N < patches, place_N, place_N + gap)
    return out, FrameBlocks(keep_BHnm, block_q, block_k, place_N, patches + gap)


def places(frames: int, tokens: int, special: int, order: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens that are patches, frame by frame and within it in `order`, and those that are special."""
    token_FP = torch.arange(frames * tokens, device=device).view(frames, tokens)
    special = min(special, tokens)
    patch_FP = token_FP[:, special:]
    if order is not None:
        patches = tokens - special
        if order.shape != (patches,) or not torch.equal(
            order.sort().values, torch.arange(patches, device=order.device)
        ):
            raise ValueError(f"order must be a permutation of a frame's {patches} patches, got {tuple(order.shape)}")
        patch_FP = patch_FP[:, order.to(device)]
    return patch_FP.flatten(), token_FP[:, :special].flatten()


@torch.no_grad()
def vggt_block_map(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    *,
    cdf_threshold: PerHead | None = None,
    sparse_ratio: float | None = None,
    top_k: int | None = None,
    block_q: int = 128,
    block_k: int = 64,
    pool: Literal["mean", "max"] = "mean",
    scale: float | None = None,
) -> Tensor:
    """Which blocks of patch keys each block of patch queries attends: bool (B, H, n, m), at least one a row.

    Time O(T^2 D / (block_q block_k) + T D) per head.

    Args:
        q_BHTD, k_BKTD: the patches, without special tokens.
        cdf_threshold: tau, the share of the pooled weight that is kept at most, for all or per head; 0.97 where none of
            the three is given.
        sparse_ratio: rho, from 0 to 1: int(m (1 - rho)) blocks are kept at least.
        top_k: instead of both, the number of blocks kept.
        block_q, block_k: patches per block.
        pool: "mean" or "max" over a block's patches.
        scale: factor of the dot product, D ** -0.5 where None.

    Raises:
        ValueError: if an option is out of range, or `top_k` comes with one of the others.
    """
    if top_k is not None and (cdf_threshold is not None or sparse_ratio is not None):
        raise ValueError("either top_k, or cdf_threshold and sparse_ratio, decide how many blocks are kept, got both")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if sparse_ratio is not None and not 0 <= sparse_ratio <= 1:
        raise ValueError(f"sparse_ratio must be from 0 to 1, got {sparse_ratio}")
    share_BHnm = pooled_shares(q_BHTD, k_BKTD, block_q, block_k, pool, scale)
    m = share_BHnm.shape[3]
    if top_k is not None:
        return top_blocks(share_BHnm, at_least=top_k)
    least = 1 if sparse_ratio is None else max(1, int(m * (1 - sparse_ratio)))
    if cdf_threshold is None and sparse_ratio is not None:
        return top_blocks(share_BHnm, at_least=least)
    tau_H = one_per_head(
        0.97 if cdf_threshold is None else cdf_threshold, "cdf_threshold", q_BHTD.shape[1], q_BHTD.device, 0.0
    )
    return top_blocks(share_BHnm, p=tau_H[:, None, None] + 1e-5, at_least=least)


def pooled_shares(
    q_BHTD: Tensor, k_BKTD: Tensor, block_q: int, block_k: int, pool: Literal["mean", "max"], scale: float | None
) -> Tensor:
    """P (B, H, n, m): softmax attention of the blocks' pooled queries to their pooled keys."""
    q_BHnD = pool_blocks(q_BHTD, block_q, mode=pool)
    k_BHmD = repeat_heads(pool_blocks(k_BKTD, block_k, mode=pool), q_BHTD.shape[1])
    return (q_BHnD @ k_BHmD.mT * (q_BHTD.shape[3] ** -0.5 if scale is None else scale)).softmax(-1)


@dataclass(frozen=True, eq=False, repr=False)
class FrameBlocks(KeptBlocks):
    """Who attends to whom, in the order of the tokens: from special tokens all, else what kept blocks hold.

    Attributes:
        keep_BHnm: the blocks kept, columns of special keys included.
        place_N: where each token stands among the keys that are cut into blocks.
        first_special: the first place of a special token.
    """

    place_N: Tensor
    first_special: int

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q, k = self.place_N[q], self.place_N[k]
        special = q >= self.first_special
        return special | self.kept(b, h, q, k) if self.keep_BHnm.shape[2] else special & (k >= 0)
