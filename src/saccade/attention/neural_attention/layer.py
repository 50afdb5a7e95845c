"""Neural Attention: the network that scores pairs, attention by its scores, and the layer.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, n and m those of a tile, C channels, D head dim,
E width of values, P projection_dim, F = P // 2, X = B H.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.pattern import GivenMask, Pattern


class PairNetwork(nn.Module):
    """The score network, one for all heads: `queries` and `keys` once per token, then `forward` on each tile of pairs.

    Args:
        head_dim: D.
        projection_dim: d'.

    Raises:
        ValueError: if projection_dim is below 2, where the second layer would have no unit.
    """

    def __init__(self, head_dim: int, projection_dim: int) -> None:
        super().__init__()
        if projection_dim < 2:
            raise ValueError(f"projection_dim must be at least 2, got {projection_dim}")
        self.projection_dim = projection_dim
        self.query_down = nn.Linear(head_dim, projection_dim)
        self.key_down = nn.Linear(head_dim, projection_dim)
        self.first = nn.Linear(2 * projection_dim, projection_dim)
        self.second = nn.Linear(projection_dim, projection_dim // 2)
        self.third = nn.Linear(projection_dim // 2, 1, bias=False)

    def queries(self, q_BHND: Tensor) -> Tensor:
        """A q' + b_1, (B, H, N, P)."""
        return F.linear(self.query_down(q_BHND), self.first.weight[:, : self.projection_dim], self.first.bias)

    def keys(self, k_BKMD: Tensor) -> Tensor:
        """B k', (B, K, M, P)."""
        return F.linear(self.key_down(k_BKMD), self.first.weight[:, self.projection_dim :])

    def forward(self, q_BHnP: Tensor, k_BHmP: Tensor) -> Tensor:
        """Scores (B, H, n, m) of what `queries` and `keys` gave."""
        B, H, n, P = q_BHnP.shape
        # channels before pairs: long contiguous rows, and the second layer is one matrix product per head
        h1_BHPnm = (q_BHnP.mT[..., None] + k_BHmP.mT[..., None, :]).relu_()
        weight_1FP, bias_1F1 = self.second.weight[None], self.second.bias[None, :, None]
        h2_XFn = torch.baddbmm(bias_1F1, weight_1FP.expand(B * H, -1, -1), h1_BHPnm.view(B * H, P, -1)).relu_()
        return (self.third.weight @ h2_XFn).view(B, H, n, k_BHmP.shape[2])


def neural_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    network: PairNetwork,
    *,
    mask: GivenMask = None,
    causal: bool = False,
    backend: str | None = None,
) -> Tensor:
    """softmax over the scores of `network`, applied to the values; (B, H, N, E).

    Args:
        q_BHND, k_BKMD, v_BKME: queries, keys, values; K divides H.
        network: the pairwise score.
        mask: (B, M) padding, 4 axes of pairs, or a mask object; True = may attend.
        causal: no query attends to a later key.
        backend: of `saccade.attend`; the planner takes "stream".

    Raises:
        ValueError: if shapes do not fit, or the backend computes dot products only.
    """
    pattern = Pattern.of(mask, q_BHND.shape[0], q_BHND.shape[2], k_BKMD.shape[2], causal=causal)
    queries, keys = network.queries(q_BHND), network.keys(k_BKMD)
    return attend(queries, keys, v_BKME, mask=pattern.mask, score=network, backend=backend)


class NeuralAttention(QKVAttention):
    """Neural Attention as a layer; decoding keeps keys of `projection_dim` and values of `head_dim` channels.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        projection_dim: d'; max(2, head_dim // 32) where None.

    Raises:
        ValueError: if an argument is out of range.
    """

    takes_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        projection_dim: int | None = None,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        width = max(2, self.head_dim // 32) if projection_dim is None else projection_dim
        self.network = PairNetwork(self.head_dim, width)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return attend(q_BHND, k_BKMD, v_BKME, mask=pattern.mask, score=self.network)

    def project(self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None) -> tuple[Any, ...]:
        """Queries and keys as they meet in the network, `projection_dim` wide, and values."""
        q_BHND, k_BKMD, v_BKMD = super().project(x_BNC, context_BMC, positions)
        return self.network.queries(q_BHND), self.network.keys(k_BKMD), v_BKMD
