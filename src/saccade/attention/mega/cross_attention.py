"""Gated attention of one sequence to another.

Shape letters: B batch, N queries, M keys, C channels, H heads, Z key width, V value width, E width of given values.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.mega.attention import ACTIVATIONS, Norm, check_names, check_tokens, width_of_keys
from saccade.attention.mega.norms import Dropout, norm_of
from saccade.attention.mega.operator import Attention, mega_attend, position_bias
from saccade.layers.initialization import start_language_model
from saccade.ops.pattern import GivenMask


class MegaCrossAttention(nn.Module):
    """Gated attention of a decoder to a context; no average, no causality.

        [u | r | q] = norm(x) W_q;  k = c W_k,  v = f(c W_v);  y = x + u (f((A v * r) W_h) - x)

    The simple bias counts x and context from their starts.

    Args:
        dim, num_heads, key_dim: C, H and Z; the value width is dim.
        attention, position, max_positions, norm, prenorm, activation: `MegaAttention`'s.
        dropout: of f((A v * r) W_h); attn_drop: of the weights; feature_dropout: drop whole channels instead.

    Raises:
        ValueError: if sizes do not fit or a name is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        key_dim: int | None = None,
        attention: Attention = "softmax",
        position: Literal["rotary", "simple"] | None = "rotary",
        max_positions: int = 1024,
        norm: Norm | None = "layer",
        prenorm: bool = True,
        activation: str = "silu",
        dropout: float = 0.0,
        attn_drop: float = 0.0,
        feature_dropout: bool = False,
    ) -> None:
        super().__init__()
        key_dim = width_of_keys(dim, num_heads) if key_dim is None else key_dim
        check_names(dim, num_heads, key_dim, dim, attention, activation)
        self.dim, self.num_heads, self.key_dim = dim, num_heads, key_dim
        self.attention: Attention = attention
        self.prenorm, self.activation = prenorm, activation
        self.attn_drop, self.dropout = attn_drop, Dropout(dropout, feature_dropout)
        self.norm = norm_of(norm, dim)
        self.q_proj = nn.Linear(dim, 2 * dim + key_dim)
        self.k_proj, self.v_proj = nn.Linear(dim, key_dim), nn.Linear(dim, dim)
        self.h_proj = nn.Linear(dim, dim)
        self.bias = position_bias(position, max_positions, key_dim, num_heads)
        self.apply(start_language_model)

    def forward(self, x_BNC: Tensor, context_BMC: Tensor, *, mask: GivenMask = None, start: int = 0) -> Tensor:
        """The tokens (B, N, C) after they have read the context.

        Args:
            mask: bool (B, M) of the context, True = real token; or pairs.
            start: position of the first of `x_BNC`, where they are decoded piece by piece.

        Raises:
            ValueError: if shapes do not fit.
        """
        for tokens in (x_BNC, context_BMC):
            check_tokens(tokens, self.dim)
        f = ACTIVATIONS[self.activation]
        update, reset, q_BNZ = self._project(x_BNC)
        v_BHMV = self._heads(f(self.v_proj(context_BMC)))
        out_BNC = self._weighted(q_BNZ, context_BMC, v_BHMV, mask, start).transpose(1, 2).flatten(2)
        candidate = self.dropout(f(self.h_proj(out_BNC * F.silu(reset))))
        y_BNC = torch.lerp(x_BNC, candidate.to(x_BNC.dtype), update.sigmoid().to(x_BNC.dtype))
        return y_BNC if self.prenorm else self.norm(y_BNC)

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, context: Tensor, mask: GivenMask = None) -> Tensor:
        """The weights A applied to given values (B, H, M, E); what `attention_map` calls."""
        return self._weighted(self._project(x_BNC)[2], context, values_BHME, mask, 0)

    def _project(self, x_BNC: Tensor) -> tuple[Tensor, ...]:
        normed = self.norm(x_BNC) if self.prenorm else x_BNC
        return self.q_proj(normed).split([self.dim, self.dim, self.key_dim], -1)

    def _weighted(self, q_BNZ: Tensor, context: Tensor, v: Tensor, mask: GivenMask, start: int) -> Tensor:
        k = self._heads(self.k_proj(context))
        return mega_attend(
            self._heads(q_BNZ),
            k,
            v,
            attention=self.attention,
            bias=self.bias,
            mask=mask,
            offset=start,
            dropout=self.attn_drop if self.training else 0.0,
        )

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
