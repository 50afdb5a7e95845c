"""Rectified SpaAttn: the pooled map, the blocks that it makes critical, and the attention that it corrects.

Shape letters: B batch, H query heads, K key heads, N tokens (M the same, as keys), V visual tokens, T text tokens,
D head dim, E width of values; n, m blocks of visual queries and keys.
"""

from __future__ import annotations

import math
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
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.selection import pool_blocks, top_blocks
from saccade.ops.sharding import in_parts

Tail = Literal["zeros", "real"]


@dataclass(frozen=True)
class RectifiedMap:
    """What the pooled map says.

    Attributes:
        share_BHnm: P, float32; with text one column more, the text's share. The only one with a gradient.
        critical_BHnm: C, the visual blocks attended to token by token.
        gains_BHnm: G, the pairs of blocks where pooling gains more than it errs.
    """

    share_BHnm: Tensor
    critical_BHnm: Tensor
    gains_BHnm: Tensor

    def kept(self, gapr: bool = True) -> Tensor:
        """K, the blocks whose share stays with the sparse output; C alone without GAPR. With text a column more."""
        kept_BHnm = self.critical_BHnm | ~self.gains_BHnm if gapr else self.critical_BHnm
        return F.pad(kept_BHnm, (0, self.share_BHnm.shape[3] - kept_BHnm.shape[3]), value=True)

    def factor(self, gapr: bool = True) -> Tensor:
        """R (B, H, n), the share that stays with the sparse output."""
        return (self.share_BHnm * self.kept(gapr)).sum(-1)


@in_parts
def rectified_spaattn_attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    *,
    text_tokens: int = 0,
    drop_rate: float = 0.8,
    top_k: int | None = None,
    cdf_threshold: float = 0.3,
    block_q: int = 128,
    block_k: int = 128,
    neighbors: Tensor | None = None,
    first_frame_blocks: int = 0,
    ipar: bool = True,
    gapr: bool = True,
    tail: Tail = "zeros",
    mask: GivenMask = None,
    causal: bool = False,
    scale: float | None = None,
    return_map: bool = False,
) -> Any:
    """Block-sparse attention among visual tokens, rectified by a pooled map; dense from and to text tokens.

    `top_k` of all visual blocks, plus one where there is text, is dense attention. Gradients flow through the sparse
    output and the pooled weights and values, none through the choice of blocks. Time
    O(density V^2 D + N T D + V^2 D / (block_q block_k)), memory linear in N apart from the pooled map. No input is
    changed.

    Args:
        q_BHND, k_BKND, v_BKNE: visual tokens, along a curve that keeps neighbours together (`gilbert_order`), then
            text. K divides H, E may differ from D.
        text_tokens: how many of the last tokens are text.
        drop_rate, top_k, cdf_threshold, block_q, block_k, neighbors, first_frame_blocks, tail: see `rectified_map`.
        ipar, gapr: scale the sparse output by R; give the blocks outside K their pooled values.
        mask: bool (B or 1, N), True = real token. Rows of padding give zeros.
        causal: must be False.
        scale: s, D ** -0.5 where None.
        return_map: also return who attends to whom token by token, a mask.

    Returns:
        out (B, H, N, E); with `return_map` also the mask.

    Raises:
        ValueError: if shapes or options do not fit, or `causal` is True.

    >>> q = k = v = torch.randn(1, 2, 96, 8)
    >>> out, kept = rectified_spaattn_attend(q, k, v, top_k=2, block_q=16, block_k=16, return_map=True)
    >>> out.shape, kept.density(96, 96, 16) < 1
    (torch.Size([1, 2, 96, 8]), True)
    """
    if causal:
        raise ValueError("rectified block-sparse attention is bidirectional, got causal=True")
    _check(q_BHND, k_BKND, v_BKNE, text_tokens)
    mask = _real_tokens(mask, q_BHND)
    N = q_BHND.shape[2]
    V = N - text_tokens
    found = rectified_map(
        q_BHND,
        k_BKND,
        text_tokens=text_tokens,
        drop_rate=drop_rate,
        top_k=top_k,
        cdf_threshold=cdf_threshold,
        block_q=block_q,
        block_k=block_k,
        neighbors=neighbors,
        first_frame_blocks=first_frame_blocks,
        tail=tail,
        mask=mask,
        scale=scale,
    )
    outs = []
    if V:
        q_visual, v_visual = q_BHND[:, :, :V], v_BKNE[:, :, :V]
        pattern, keys, values = _with_text(found.critical_BHnm, k_BKND, v_BKNE, V, block_q, block_k, mask)
        out = attend(q_visual, keys, values, mask=pattern, scale=scale)
        if ipar:
            out = out * _rows(found.factor(gapr)[..., None], block_q, V).to(out.dtype)
        if gapr:
            m = found.critical_BHnm.shape[3]
            valid = None if mask is None else mask[:, :V]
            pooled = repeat_heads(pool_blocks(v_visual, block_k, tail=tail, valid_BN=valid), q_BHND.shape[1])
            share = (found.share_BHnm * ~found.kept()).narrow(3, 0, m)
            out = out + _rows((share.to(pooled.dtype) @ pooled).to(out.dtype), block_q, V)
        outs.append(out)
    if text_tokens or not V:
        everything = None if mask is None else masks.padding(mask)
        outs.append(attend(q_BHND[:, :, V:], k_BKND, v_BKNE, mask=everything, scale=scale))
    out = torch.cat(outs, 2) if len(outs) > 1 else outs[0]
    if mask is not None:
        out = out.masked_fill(~mask[:, None, :, None], 0.0)
    if not return_map:
        return out
    pairs: Mask = RectifiedBlocks(found.critical_BHnm, block_q, block_k, V)
    if not text_tokens:
        pairs = masks.blocks(found.critical_BHnm, (block_q, block_k))
    return out, pairs if mask is None else pairs & masks.padding(mask)


def rectified_map(
    q_BHND: Tensor,
    k_BKND: Tensor,
    *,
    text_tokens: int = 0,
    drop_rate: float = 0.8,
    top_k: int | None = None,
    cdf_threshold: float = 0.3,
    block_q: int = 128,
    block_k: int = 128,
    neighbors: Tensor | None = None,
    first_frame_blocks: int = 0,
    tail: Tail = "zeros",
    mask: GivenMask = None,
    scale: float | None = None,
) -> RectifiedMap:
    """The pooled map, the blocks that it makes critical, and where it is worth its error.

    Args:
        q_BHND, k_BKND, text_tokens, mask, scale: see `rectified_spaattn_attend`.
        drop_rate: share of blocks that may be left out, 0 to 1; at least `int((1 - drop_rate) * blocks)` are critical.
        top_k: instead of it, how many are critical at least.
        cdf_threshold: p, blocks are critical until their shares sum to more.
        block_q, block_k: tokens per block of queries and keys.
        neighbors: bool (n, m), blocks that are critical to each other in any case.
        first_frame_blocks: F, the first blocks, which are critical to each other.
        tail: what a short last block, or one with padding, is filled up with: "zeros", or nothing ("real").

    Raises:
        ValueError: if shapes or options do not fit.
    """
    _check(q_BHND, k_BKND, k_BKND, text_tokens)
    mask = _real_tokens(mask, q_BHND)
    H, N, D = q_BHND.shape[1:]
    V = N - text_tokens
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q and block_k must be at least 1, got {block_q} and {block_k}")
    if not 0.0 <= drop_rate <= 1.0:
        raise ValueError(f"drop_rate must be from 0 to 1, got {drop_rate}")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must not be negative, got {top_k}")
    if not cdf_threshold >= 0.0:
        raise ValueError(f"cdf_threshold must be a number of at least 0, got {cdf_threshold}")
    if tail not in ("zeros", "real"):
        raise ValueError(f"tail must be 'zeros' or 'real', got {tail!r}")
    if first_frame_blocks < 0:
        raise ValueError(f"first_frame_blocks must not be negative, got {first_frame_blocks}")
    n, m = -(-V // block_q), -(-V // block_k)
    if neighbors is not None and (neighbors.dtype != torch.bool or neighbors.shape != (n, m)):
        raise ValueError(f"neighbors must be bool ({n}, {m}), got {neighbors.dtype} {tuple(neighbors.shape)}")
    valid = None if mask is None else mask[:, :V]
    q_BHnD, dq_BHnD = _means(q_BHND[:, :, :V], block_q, tail, valid)
    k_BHmD, dk_BHmD = (repeat_heads(x, H) for x in _means(k_BKND[:, :, :V], block_k, tail, valid))
    product_BHnm = q_BHnD @ k_BHmD.mT
    scale = D**-0.5 if scale is None else scale
    scores = product_BHnm * scale
    absent = None
    if valid is not None or tail == "real":
        weight = _counts(V, block_k, valid, q_BHnD)
        absent = (weight == 0)[:, None, None]
        # in logits a weight is its logarithm
        weight = weight if tail == "real" else torch.where(weight > 0, block_k, 0.0)
        scores = scores + weight.log()[:, None, None]
    elif text_tokens:
        scores = scores + math.log(block_k)
    if text_tokens:
        text = q_BHnD @ repeat_heads(k_BKND[:, :, V:], H).to(q_BHnD.dtype).mT * scale
        if mask is not None:
            text = text.masked_fill(~mask[:, None, None, V:], float("-inf"))
        scores = torch.cat([scores, text], 3)
    share = scores.softmax(-1)
    if mask is not None:  # rows of padding alone
        share = share.masked_fill(~mask.any(1)[:, None, None, None], 0.0)
    if text_tokens:
        share = torch.cat([share[..., :m], share[..., m:].sum(-1, keepdim=True)], 3)
    with torch.no_grad():
        error = (dq_BHnD @ k_BHmD.mT).abs() + (q_BHnD @ dk_BHmD.mT).abs()
        gains = product_BHnm.abs() > error
        least = int((1 - drop_rate) * m) if top_k is None else top_k
        critical = top_blocks(share, p=cdf_threshold, crossing=True, at_least=least)[..., :m]
        if neighbors is not None:
            critical = critical | neighbors.to(critical.device)
        if first_frame_blocks:
            critical[:, :, :first_frame_blocks, :first_frame_blocks] = True
        if absent is not None:
            critical = critical & ~absent
    return RectifiedMap(share, critical, gains)


def _means(x_BHND: Tensor, size: int, tail: Tail, valid_BN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Block means, and the mean distance of a block's tokens from them, entry by entry (without gradient)."""
    mean = pool_blocks(x_BHND, size, tail=tail, valid_BN=valid_BN)
    N = x_BHND.shape[2]
    with torch.no_grad():
        away = (x_BHND - _rows(mean, size, N)).abs()
        away = pool_blocks(away, size, tail=tail, valid_BN=valid_BN)
        if tail == "zeros" and (N % size or valid_BN is not None):
            # missing tokens lie at zero, |mean| away
            missing = 1 - _counts(N, size, valid_BN, mean) / size
            away = away + missing[:, None, :, None] * mean.abs()
    return mean, away


def _counts(N: int, size: int, valid_BN: Tensor | None, like: Tensor) -> Tensor:
    """Real tokens in each block, (B or 1, blocks)."""
    real = torch.ones(1, N, device=like.device) if valid_BN is None else valid_BN
    return F.pad(real.to(like.dtype), (0, -N % size)).unflatten(1, (-1, size)).sum(2)


def _rows(x_BHnE: Tensor, size: int, N: int) -> Tensor:
    """One vector per block -> one per token."""
    return x_BHnE.repeat_interleave(size, 2)[:, :, :N]


def _with_text(
    critical_BHnm: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    V: int,
    block_q: int,
    block_k: int,
    mask: Tensor | None,
) -> tuple[Mask, Tensor, Tensor]:
    """The pattern of visual queries over [visual keys, up to a whole block, text keys], and those keys and values."""
    text = k_BKND.shape[2] - V
    keep = F.pad(critical_BHnm, (0, -(-text // block_k)), value=True)
    pattern = masks.blocks(keep, (block_q, block_k))
    gap = -V % block_k if text else 0
    if mask is not None or gap:
        real = k_BKND.new_ones(1, V + text, dtype=torch.bool) if mask is None else mask
        real = torch.cat([F.pad(real[:, :V], (0, gap), value=False), real[:, V:]], 1)
        pattern = pattern & masks.padding(real)
    if gap:
        k_BKND, v_BKNE = (torch.cat([F.pad(x[:, :, :V], (0, 0, 0, gap)), x[:, :, V:]], 2) for x in (k_BKND, v_BKNE))
    return pattern, k_BKND, v_BKNE


def _real_tokens(mask: GivenMask, q_BHND: Tensor) -> Tensor | None:
    B, _, N, _ = q_BHND.shape
    return Pattern.of(mask, B, N, N).only(("padding",), "rectified block-sparse attention").valid_BM


def _check(q: Tensor, k: Tensor, v: Tensor, text_tokens: int) -> None:
    check_qkv(q, k, v, tokens="same")
    if not 0 <= text_tokens <= q.shape[2]:
        raise ValueError(f"text_tokens must be from 0 to the number of tokens ({q.shape[2]}), got {text_tokens}")


@dataclass(frozen=True, eq=False, repr=False)
class RectifiedBlocks(KeptBlocks):
    """Pairs computed token by token: from and to text all, among the first `visual` tokens what critical blocks hold.

    Attributes:
        visual: tokens before the text.
    """

    visual: int

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        text = (q >= self.visual) | (k >= self.visual)
        return text | self.kept(b, h, q, k) if self.visual else text
