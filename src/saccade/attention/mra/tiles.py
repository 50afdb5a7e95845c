"""Sums over tiles of a resolution, their way to tokens, and how parts are merged.

Shape letters: B batch, H heads, N tokens, E width of values, r children per side of a tile.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.merge import merge


def sum_rows(logits: Tensor, value: Tensor, x: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
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


def to_tokens(size: int, out: Tensor, lse: Tensor, N: int) -> tuple[Tensor, Tensor]:
    """What each block got, for each of its tokens."""
    if size == 1:
        return out[:, :, :N], lse[:, :, :N]
    return out.repeat_interleave(size, 2)[:, :, :N], lse.repeat_interleave(size, 2)[:, :, :N]


def merge_blocks(out: Tensor, lse: Tensor, size: int, out_part: Tensor, lse_part: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` of tokens with blocks, the blocks' rows not copied where they are whole."""
    N, blocks = out.shape[2], out_part.shape[2]
    if size == 1 or blocks * size != N:
        return merge(out, lse, *to_tokens(size, out_part, lse_part, N))
    out, lse = out.unflatten(2, (blocks, size)), lse.unflatten(2, (blocks, size))
    rows = out_part[:, :, :, None].to(out.dtype).expand(out.shape), lse_part[..., None].to(lse.dtype).expand(lse.shape)
    out, lse = merge(out, lse, *rows)
    return out.flatten(2, 3), lse.flatten(2, 3)


def tokens_per_block(valid: Tensor | None, length: int, size: int, device: torch.device) -> Tensor:
    """Real tokens of each block, (B or 1, blocks)."""
    if valid is None:
        return torch.arange(0, length, size, device=device).neg().add(length).clamp(max=size)[None]
    return F.pad(valid, (0, -length % size)).unflatten(1, (-1, size)).sum(2)
