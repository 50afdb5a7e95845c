"""Clips and words that look at each other, and the encoder's layers over clips.

Shape letters: B batch, N queries, M keys, L clips, W words, C or D width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.softmax_attention import SoftmaxAttention


class BetweenAttention(SoftmaxAttention):
    """Softmax attention whose queries, keys and values are read off three things, as in `nn.MultiheadAttention`.

    Args:
        dim: D.
        num_heads: of the attention.
        drop: of attention weights.

    Raises:
        ValueError: if heads do not divide the width.
    """

    def __init__(self, dim: int, num_heads: int, drop: float = 0.1) -> None:
        super().__init__(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True, attn_drop=drop)

    def forward(  # type: ignore[override]
        self, query_BND: Tensor, key_BMD: Tensor, value_BMD: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """(B, N, D); `mask` is bool (B, M), False is padding."""
        return self.steps(query_BND, key_BMD, mask, None, value_BMD=value_BMD)

    def project(  # type: ignore[override]
        self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None, *, value_BMD: Tensor
    ) -> tuple[Any, ...]:
        parts = (self.q_proj(x_BNC), self.k_proj(context_BMC), self.v_proj(value_BMD))
        return tuple(self.split_heads(part, self.num_heads) for part in parts)


class BiCMF(nn.Module):
    """Bi-directional cross-modal fusion: clips after the words, words after the clips, clips after those words.

        v1 = LN(v + L1 A(v, t));  t1 = t + L2 A(t, v);  c = LN(v1 + L3 A(v1, t1));  y = L5 prelu(L4 c);  out = LN(y + y)

    Args:
        dim: D.
        num_heads: of each attention.
        feedforward: inner width.
        drop: of attention weights and branches.
        single_residual: out = LN(c + y).

    Raises:
        ValueError: if heads do not divide the width.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        feedforward: int = 1024,
        drop: float = 0.1,
        *,
        single_residual: bool = False,
    ) -> None:
        super().__init__()
        self.words_to_clips, self.clips_to_words, self.fused = (
            BetweenAttention(dim, num_heads, drop) for _ in range(3)
        )
        self.linear1, self.linear2, self.linear3 = (nn.Linear(dim, dim) for _ in range(3))
        self.linear4, self.linear5 = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.norm1, self.norm3, self.norm4 = (nn.LayerNorm(dim) for _ in range(3))
        self.activation, self.drop = nn.PReLU(), nn.Dropout(drop)
        self.single_residual = single_residual

    def forward(
        self,
        clips_BLD: Tensor,
        words_BWD: Tensor,
        clip_place_BLD: Tensor,
        word_place_BWD: Tensor | None = None,
        clips_BL: Tensor | None = None,
        words_BW: Tensor | None = None,
    ) -> Tensor:
        """The clips, (B, L, D).

        Args:
            clips_BLD, words_BWD: clips and words.
            clip_place_BLD, word_place_BWD: their positions, which queries and keys have; None for none.
            clips_BL, words_BW: bool, False is padding.
        """
        placed_clips = clips_BLD + clip_place_BLD
        placed_words = words_BWD if word_place_BWD is None else words_BWD + word_place_BWD
        seen = self.words_to_clips(placed_clips, placed_words, words_BWD, words_BW)
        first = self.norm1(clips_BLD + self.linear1(self.drop(seen)))
        seen = self.clips_to_words(placed_words, placed_clips, clips_BLD, clips_BL)
        words = words_BWD + self.linear2(self.drop(seen))
        both = self.norm3(first + self.linear3(self.drop(self.fused(first, words, words, words_BW))))
        y = self.linear5(self.drop(self.activation(self.linear4(both))))
        return self.norm4((both if self.single_residual else y) + self.drop(y))


class EncoderLayer(nn.Module):
    """Post-norm: x = LN(x + A(x)), LN(x + FFN(x)); positions are added to queries and keys anew.

    Args:
        dim, num_heads, feedforward, drop: as in `BiCMF`.

    Raises:
        ValueError: if heads do not divide the width.
    """

    def __init__(self, dim: int = 256, num_heads: int = 8, feedforward: int = 1024, drop: float = 0.1) -> None:
        super().__init__()
        self.attention = BetweenAttention(dim, num_heads, drop)
        self.linear1, self.linear2 = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.activation, self.drop = nn.PReLU(), nn.Dropout(drop)

    def forward(self, x_BND: Tensor, place_BND: Tensor, mask_BN: Tensor | None = None) -> Tensor:
        """(B, N, D); `mask_BN` is bool, False is padding."""
        placed = x_BND + place_BND
        x_BND = self.norm1(x_BND + self.drop(self.attention(placed, placed, x_BND, mask_BN)))
        return self.norm2(x_BND + self.drop(self.linear2(self.drop(self.activation(self.linear1(x_BND))))))


def unit(x: Tensor) -> Tensor:
    """Of length 1 over the last axis."""
    return F.normalize(x, dim=-1)
