"""Attention to tokens at several depths, and each depth's share in it, as functions of tensors.

Shape letters: B batch, N queries, M tokens that are attended to, S depths, H query heads, K key heads, D head dim,
E width of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.masks import EMPTY, FULL, Mask
from saccade.ops.merge import merge

#: tokens from which a causal softmax per depth, merged, beats one over the staircase of all depths on the CPU: equal at
#: 1024, 0.7 of its time at 4096, forward and backward
LONG = 1024
Depths = Sequence[int] | Literal["all"] | None


@dataclass(frozen=True, eq=False)
class DepthMask(Mask):
    """A mask of tokens over keys that hold each token `depths` times in a row.

    Attributes:
        tokens: the mask over (query, token) pairs.
        depths: S.
    """

    tokens: Mask
    depths: int

    @property
    def batch(self) -> int:
        return self.tokens.batch

    @property
    def heads(self) -> int:
        return self.tokens.heads

    def check(self, n: int, m: int) -> None:
        if m % self.depths:
            raise ValueError(f"keys must hold {self.depths} depths of each token, got {m} keys")
        self.tokens.check(n, m // self.depths)

    def tensors(self) -> list[Tensor]:
        return self.tokens.tensors()

    def to(self, device: torch.device | str) -> Mask:
        return DepthMask(self.tokens.to(device), self.depths)

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return self.tokens.allowed(b, h, q, k // self.depths)

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
        size = max(1, block_k // self.depths)
        states = self.tokens.block_map(n, m // self.depths, (block_q, size), device)
        first_k = torch.arange(0, m, block_k, device=device)
        last_k = (first_k + block_k - 1).clamp(max=m - 1)
        # a block of keys touches a few blocks of tokens: from `first` to `last`, at most `reach` of them
        first, last = first_k // self.depths // size, last_k // self.depths // size
        reach = ((block_k - 1) // self.depths + 1) // size + 2
        touched = torch.stack([states[..., torch.minimum(first + i, last)] for i in range(reach)])
        some, every = touched.amax(0) != EMPTY, touched.amin(0) == FULL
        return some.to(torch.int8) + every.to(torch.int8)

    def __repr__(self) -> str:
        return f"depths({self.tokens!r}, {self.depths})"


def _token_mask(mask: Mask | None, causal: bool, offset: int, N: int) -> Mask | None:
    """Which tokens a query sees; a single query after all others sees everything that `mask` lets it."""
    if not causal or (offset and N == 1):
        return mask
    return masks.causal(offset) if mask is None else mask & masks.causal(offset)


def shortcut_attend(
    q_BHND: Tensor,
    k_BKMSD: Tensor,
    v_BKMSE: Tensor,
    *,
    mask: Mask | None = None,
    causal: bool = True,
    offset: int = 0,
    scale: float | None = None,
) -> Tensor:
    """softmax(q K^T scale) V over all depths of the tokens that a query sees: (B, H, N, E).

    Work follows the mask's blocks, memory is linear. The order of the depths does not matter.

    Args:
        q_BHND: queries; query 0 stands at token `offset`.
        k_BKMSD, v_BKMSE: keys and values of M tokens at S depths; K divides H.
        mask: over (query, token) pairs, for every depth; without causality.
        causal: no query sees a later token.
        offset: tokens before query 0.
        scale: D ** -0.5 where None.

    Raises:
        ValueError: if shapes do not fit.

    >>> q, k = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 3, 4)
    >>> shortcut_attend(q, k, k).shape
    torch.Size([1, 2, 5, 4])
    """
    S = _check_depths(k_BKMSD, v_BKMSE)
    if mask is None and causal and not offset and k_BKMSD.shape[2] >= LONG and q_BHND.device.type == "cpu":
        return _depth_by_depth(q_BHND, k_BKMSD, v_BKMSE, scale)
    seen = _token_mask(mask, causal, offset, q_BHND.shape[2])
    if seen is not None and S > 1:
        seen = DepthMask(seen, S)
    return attend(q_BHND, k_BKMSD.flatten(2, 3), v_BKMSE.flatten(2, 3), mask=seen, scale=scale)


def _depth_by_depth(q_BHND: Tensor, k_BKMSD: Tensor, v_BKMSE: Tensor, scale: float | None) -> Tensor:
    """The same without a mask beyond causality: the softmax over a union of keys, from that over each part."""
    (out, lse), *others = (
        attend(q_BHND, k_BKMD, v_BKME, mask=masks.causal(), scale=scale, return_lse=True)
        for k_BKMD, v_BKME in zip(k_BKMSD.unbind(3), v_BKMSE.unbind(3))
    )
    for other in others:
        out, lse = merge(out, lse, *other)
    return out


def depth_shares(
    q_BHND: Tensor,
    k_BKMSD: Tensor,
    *,
    mask: Mask | None = None,
    causal: bool = True,
    offset: int = 0,
    scale: float | None = None,
) -> Tensor:
    """How much of each query's attention goes to each depth, (B, H, N, S); rows sum to 1, or to 0 without any key.

    share_l = exp(lse_l - lse) with lse_l the log of the sum of exponentials over the keys of depth l alone: no map of
    weights is made.

    Args:
        q_BHND, k_BKMSD, mask, causal, offset, scale: `shortcut_attend`'s.

    Raises:
        ValueError: if shapes do not fit.
    """
    S = _check_depths(k_BKMSD, k_BKMSD)
    seen = _token_mask(mask, causal, offset, q_BHND.shape[2])
    lse = [
        attend(q_BHND, k_BKMSD[:, :, :, i], k_BKMSD[:, :, :, i, :0], mask=seen, scale=scale, return_lse=True)[1]
        for i in range(S)
    ]
    lse_BHNS = torch.stack(lse, -1)
    nothing = lse_BHNS.amax(-1, keepdim=True) == -torch.inf
    return lse_BHNS.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)


def _check_depths(k_BKMSD: Tensor, v_BKMSE: Tensor) -> int:
    if k_BKMSD.ndim != 5 or k_BKMSD.shape[:4] != v_BKMSE.shape[:4] or not k_BKMSD.shape[3]:
        raise ValueError(
            f"keys and values must be (batch, heads, tokens, depths, width), got {tuple(k_BKMSD.shape)} and "
            f"{tuple(v_BKMSE.shape)}"
        )
    return k_BKMSD.shape[3]
