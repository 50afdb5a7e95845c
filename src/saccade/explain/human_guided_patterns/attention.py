"""Attention with patterns in its heads, and the projected layer that brings them beside somebody else's block.

    masked   A = softmax(q k^T / sqrt D + m),  m_ij = padding's where P_ij, else -10000
    fixed    A = softmax(P / sqrt D + m): even over what the pattern is about; only the values are learned
    y = gelu(W_up Attn(W_down x + b_d) + b_u)                                     `ProjectedAttention`

A row of which the pattern is about nothing has -10000 everywhere: a masked head sees all as if it had no pattern, a
fixed one is even.

Shape letters: B batch, L tokens, C channels, H heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: what is added to a score outside of a pattern
MASKED = -10000.0


class Attended(NamedTuple):
    """What comes out of attention.

    Attributes:
        out: of the tokens; (B, H, L, D) of the function, (B, L, C) of the layer.
        weights: A, (B, H, L, L).
    """

    out: Tensor
    weights: Tensor


def pattern_attend(
    q_BHLD: Tensor,
    k_BHLD: Tensor,
    v_BHLD: Tensor,
    pattern_BHLL: Tensor | None = None,
    *,
    fixed: Sequence[int] = (),
    bias: Tensor | None = None,
    scale: float | None = None,
    masked: float = MASKED,
    drop: float = 0.0,
) -> Attended:
    """Softmax attention whose heads are masked by patterns, or fixed to them.

    Args:
        q_BHLD, k_BHLD, v_BHLD: queries, keys and values.
        pattern_BHLL: P, bool; None is plain attention. B and H may be 1.
        fixed: numbers of the heads in which P stands for q k^T.
        bias: added to the scores where P is true, (B, 1 or H, 1 or L, L): of padding, a very negative one. Where P is
            false, `masked` stands in its place, also at padding.
        scale: 1 / sqrt D where None.
        masked: see `MASKED`.
        drop: dropout of the weights.

    Raises:
        ValueError: if the pattern is not bool of those shapes.
    """
    L = k_BHLD.shape[2]
    if pattern_BHLL is not None and (pattern_BHLL.dtype != torch.bool or pattern_BHLL.shape[-2:] != (L, L)):
        shape = tuple(pattern_BHLL.shape)
        raise ValueError(f"pattern must be bool (batch, heads, {L}, {L}), got {pattern_BHLL.dtype} {shape}")
    wide = torch.promote_types(q_BHLD.dtype, torch.float32)
    score_BHLL = (q_BHLD @ k_BHLD.mT).to(wide)
    bias = score_BHLL.new_zeros(()) if bias is None else bias.to(wide)
    if pattern_BHLL is not None:
        if len(fixed):
            chosen_H = torch.isin(torch.arange(q_BHLD.shape[1], device=q_BHLD.device), _tensor(fixed, q_BHLD))
            score_BHLL = torch.where(chosen_H[:, None, None], pattern_BHLL.to(wide), score_BHLL)
        bias = torch.where(pattern_BHLL, bias, masked)
    scale = q_BHLD.shape[-1] ** -0.5 if scale is None else scale
    weight_BHLL = (score_BHLL * scale + bias).softmax(-1).to(v_BHLD.dtype)
    return Attended(F.dropout(weight_BHLL, drop) @ v_BHLD, weight_BHLL)


class PatternAttention(nn.Module):
    """BERT's self-attention without its output projection, (B, L, C) -> (B, L, C), with patterns in its heads.

    Args:
        dim: C.
        num_heads: H, a divisor of C.
        drop: dropout of the weights.

    Raises:
        ValueError: if heads do not divide channels.

    >>> layer, previous = PatternAttention(8, 4), torch.eye(5).bool().roll(-1, 1)[None, None]
    >>> layer(torch.randn(1, 5, 8), previous, fixed=(0,)).out.shape
    torch.Size([1, 5, 8])
    """

    def __init__(self, dim: int, num_heads: int, drop: float = 0.0) -> None:
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        self.dim, self.num_heads, self.drop = dim, num_heads, drop
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim) for _ in range(3))

    def forward(
        self,
        x_BLC: Tensor,
        pattern_BHLL: Tensor | None = None,
        *,
        fixed: Sequence[int] = (),
        bias: Tensor | None = None,
    ) -> Attended:
        """
        Args:
            x_BLC: tokens.
            pattern_BHLL, fixed, bias: of `pattern_attend`.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if x_BLC.ndim != 3 or x_BLC.shape[2] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x_BLC.shape)}")
        q, k, v = (
            project(x_BLC).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        drop = self.drop if self.training else 0.0
        out, weights = pattern_attend(q, k, v, pattern_BHLL, fixed=fixed, bias=bias, drop=drop)
        return Attended(out.transpose(1, 2).flatten(2), weights)


class ProjectedAttention(nn.Module):
    """PAL: what stands parallel to a block, and is added to the residual before its last norm; (B, L, C) to the same.

    Args:
        dim: C.
        hidden: width of its attention.
        num_heads: of its attention.
        drop: dropout of the weights.

    Raises:
        ValueError: if heads do not divide `hidden`.
    """

    def __init__(self, dim: int, hidden: int = 256, num_heads: int = 4, drop: float = 0.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.attention = PatternAttention(hidden, num_heads, drop)

    def forward(
        self,
        x_BLC: Tensor,
        pattern_BHLL: Tensor | None = None,
        *,
        fixed: Sequence[int] = (),
        bias: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x_BLC: what the block is given.
            pattern_BHLL, fixed, bias: of `pattern_attend`.

        Raises:
            ValueError: if the pattern has another shape.
        """
        inner = self.attention(self.down(x_BLC), pattern_BHLL, fixed=fixed, bias=bias).out
        return F.gelu(self.up(inner))


def padding_bias(real_BL: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """What hides padding, (B, 1, 1, L): 0 at real tokens.

    Args:
        real_BL: bool, True is a real token.
        dtype: of the bias.
    """
    return torch.zeros_like(real_BL, dtype=dtype).masked_fill(~real_BL, torch.finfo(dtype).min)[:, None, None]


def _tensor(numbers: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(numbers), device=like.device)
