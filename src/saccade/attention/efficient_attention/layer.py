"""The layer on sequences, the paper's module on feature maps, and the non-local block beside which it is judged.

Shape letters: B batch, N queries, M keys, C channels, H query heads, K key heads, D key width, E value width; in maps
H and W are height and width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.efficient_attention.operator import Normalization, efficient_attend
from saccade.layers.state_attention import StateAttention
from saccade.ops.backends.sdpa import in_rows
from saccade.ops.feature_maps import check_map


class EfficientAttention(StateAttention):
    """Efficient attention on token sequences; without positions, as in the paper.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, qkv_bias, proj_bias: as in `QKVAttention`, with biases by
            default, which the paper's 1x1 convolutions have. causal=True is not in the paper.
        normalization: "softmax" or "scaling".

    Raises:
        ValueError: if head counts do not divide, or the normalisation is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        causal: bool = False,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        normalization: Normalization = "softmax",
        qkv_bias: bool = True,
        proj_bias: bool = True,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            causal,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=False,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
        )
        _check_normalization(normalization)
        self.normalization: Normalization = normalization

    def aggregate(
        self,
        q_BHND: Tensor,
        k_BKMD: Tensor,
        v_BKME: Tensor,
        *,
        query_mask_BN: Tensor | None,
        mask_BM: Tensor | None,
        causal: bool,
        state: Any = None,
        return_state: bool = False,
    ) -> Any:
        options: dict[str, Any] = {"normalization": self.normalization, "state": state, "return_state": return_state}
        return efficient_attend(q_BHND, k_BKMD, v_BKME, mask=mask_BM, causal=causal, **options)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, causal={self.causal}, normalization={self.normalization!r}"


class EfficientAttention2d(nn.Module):
    """The paper's module on feature maps: x + W_r E(x W_q, x W_k, x W_v), any height and width.

    Args:
        channels: c.
        num_heads: groups of the channels of keys and values.
        key_channels, value_channels: d_k, d_v over all heads; c / 2 where None.
        normalization: "softmax" or "scaling".
        residual: add the input.

    Raises:
        ValueError: if the heads do not divide key_channels and value_channels.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        *,
        key_channels: int | None = None,
        value_channels: int | None = None,
        normalization: Normalization = "softmax",
        residual: bool = True,
    ) -> None:
        super().__init__()
        key_channels = max(1, channels // 2) if key_channels is None else key_channels
        value_channels = max(1, channels // 2) if value_channels is None else value_channels
        if num_heads < 1 or key_channels % num_heads or value_channels % num_heads:
            raise ValueError(
                f"num_heads must divide key_channels ({key_channels}) and value_channels ({value_channels}), "
                f"got {num_heads}"
            )
        _check_normalization(normalization)
        self.channels, self.num_heads, self.residual = channels, num_heads, residual
        self.normalization: Normalization = normalization
        self.k_proj = nn.Conv2d(channels, key_channels, 1)
        self.q_proj = nn.Conv2d(channels, key_channels, 1)
        self.v_proj = nn.Conv2d(channels, value_channels, 1)
        self.out_proj = nn.Conv2d(value_channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """x + W_r E(x W_q, x W_k, x W_v), of the shape of x.

        Raises:
            ValueError: if x is not (B, channels, H, W).
        """
        self._check(x_BCHW)
        out_BHNE = self.mix(x_BCHW, self._heads(self.v_proj(x_BCHW)))
        out_BCHW = self.out_proj(out_BHNE.mT.flatten(1, 2).unflatten(-1, x_BCHW.shape[2:]))
        return x_BCHW + out_BCHW if self.residual else out_BCHW

    def mix(self, x_BCHW: Tensor, values_BHME: Tensor) -> Tensor:
        """This module's weights on `x_BCHW`, applied to given values of its H W positions (row-major)."""
        q_BHND, k_BHND = self._heads(self.q_proj(x_BCHW)), self._heads(self.k_proj(x_BCHW))
        return efficient_attend(q_BHND, k_BHND, values_BHME, normalization=self.normalization)

    def maps(self, x_BCHW: Tensor) -> Tensor:
        """The global attention maps rho_k(K) (B, key_channels, H, W): what each key channel looks at."""
        self._check(x_BCHW)
        k_BCHW = self.k_proj(x_BCHW)
        if self.normalization == "softmax":
            return k_BCHW.flatten(2).softmax(-1).view_as(k_BCHW)
        return k_BCHW / (k_BCHW.shape[2] * k_BCHW.shape[3]) ** 0.5

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, normalization={self.normalization!r}"

    def _heads(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW.flatten(2).unflatten(1, (self.num_heads, -1)).mT

    def _check(self, x_BCHW: Tensor) -> None:
        check_map(x_BCHW, self.channels, empty=True)


def _check_normalization(normalization: str) -> None:
    if normalization not in ("softmax", "scaling"):
        raise ValueError(f"normalization must be 'softmax' or 'scaling', got {normalization!r}")


class DotProduct2d(EfficientAttention2d):
    """The non-local block to compare with: the same projections around softmax(Q K^T) V."""

    def mix(self, x_BCHW: Tensor, values_BHME: Tensor) -> Tensor:
        q_BHND, k_BHND = self._heads(self.q_proj(x_BCHW)), self._heads(self.k_proj(x_BCHW))
        q_BHND, k_BHND, values_BHME = (in_rows(x) for x in (q_BHND, k_BHND, values_BHME))
        return F.scaled_dot_product_attention(q_BHND, k_BHND, values_BHME, scale=1.0)
