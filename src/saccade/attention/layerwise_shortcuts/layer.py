"""The features of the depths, and the cross-attention by which the last layer chooses among them.

Shape letters: B batch, N queries, M tokens that are attended to, S depths, C channels, H query heads, K key heads,
D head dim, E width of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from saccade.attention.layerwise_shortcuts.operator import depth_shares, shortcut_attend
from saccade.layers.cache import KVCache
from saccade.layers.mlp import MLP
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.heads import repeat_heads
from saccade.ops.pattern import GivenMask, Pattern


class DepthFeature(nn.Module):
    """f = MLP(LN(h)), C -> hidden -> C with GELU.

    Args:
        dim: C.
        hidden: inner width; 0 leaves LN(h) alone.
        residual: add LN(h), and start with an MLP that gives 0.
    """

    def __init__(self, dim: int, hidden: int, *, residual: bool = False) -> None:
        super().__init__()
        self.norm, self.residual = nn.LayerNorm(dim), residual
        self.mlp = MLP(dim, hidden) if hidden else None
        self.start()

    def start(self) -> None:
        """With `residual`, set the MLP's last layer to 0."""
        if self.residual and self.mlp is not None:
            nn.init.zeros_(self.mlp.fc2.weight)
            nn.init.zeros_(self.mlp.fc2.bias)

    def forward(self, h_BMC: Tensor) -> Tensor:
        u_BMC = self.norm(h_BMC)
        if self.mlp is None:
            return u_BMC
        return u_BMC + self.mlp(u_BMC) if self.residual else self.mlp(u_BMC)


class ShortcutAttention(QKVAttention):
    """Cross-attention from one layer's tokens to the features of S others, as a layer of its own.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        depths: S, how many hidden states it is given.
        mlp_hidden, combine, tied_mlp, depth_embedding, residual_mlp: see the paper's page.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        depths: int = 3,
        mlp_hidden: int | None = None,
        combine: Literal["keys", "features"] = "keys",
        tied_mlp: bool = False,
        depth_embedding: bool = False,
        residual_mlp: bool = False,
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        if depths < 1:
            raise ValueError(f"depths must be at least 1, got {depths}")
        if mlp_hidden is not None and mlp_hidden < 0:
            raise ValueError(f"mlp_hidden must not be negative, got {mlp_hidden}")
        if combine not in ("keys", "features"):
            raise ValueError(f"combine must be 'keys' or 'features', got {combine!r}")
        self.depths, self.combine = depths, combine
        hidden = dim if mlp_hidden is None else mlp_hidden
        modules = 1 if tied_mlp else depths
        self.feature_of = nn.ModuleList(DepthFeature(dim, hidden, residual=residual_mlp) for _ in range(modules))
        self.embedding = nn.Parameter(0.02 * torch.randn(depths, dim)) if depth_embedding else None
        self.join = nn.Linear(depths * dim, dim) if combine == "features" else None

    @property
    def keys_per_token(self) -> int:
        """S, or 1 where features are joined."""
        return 1 if self.combine == "features" else self.depths

    def features(self, hidden: Sequence[Tensor]) -> Tensor:
        """C: (B, M, S, C), or (B, M, 1, C) where features are joined."""
        tied = len(self.feature_of) == 1
        c_BMSC = torch.stack([self.feature_of[0 if tied else i](h) for i, h in enumerate(hidden)], 2)
        c_BMSC = c_BMSC if self.embedding is None else c_BMSC + self.embedding
        return c_BMSC if self.join is None else self.join(c_BMSC.flatten(2))[:, :, None]

    def forward(  # type: ignore[override]
        self,
        x_BNC: Tensor,
        hidden: Sequence[Tensor],
        *,
        mask: GivenMask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attend from `x_BNC` to the hidden states (B, N, C) of the same tokens, and to what `cache` holds before them.

        Args:
            hidden: S of them, in the order of the depths. They are normalised here, `x_BNC` is not.
            mask: bool (B, M), True = real token, or pairs of queries and tokens; counts for every depth.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        return self.steps(x_BNC, None, mask, cache, hidden=hidden)

    def project(  # type: ignore[override]
        self, x_BNC: Tensor, context_BMC: None, positions: Tensor | None, *, hidden: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, N, D), keys and values (B, K, M, S, D)."""
        shapes = [tuple(h.shape) for h in hidden]
        if shapes != [tuple(x_BNC.shape)] * self.depths:
            raise ValueError(f"hidden must be {self.depths} tensors of shape {tuple(x_BNC.shape)}, got {shapes}")
        c_BMSC = self.features(hidden)
        q = self.split_heads(self.q_proj(x_BNC), self.num_heads)
        k, v = (p(c_BMSC).unflatten(-1, (-1, self.head_dim)).permute(0, 3, 1, 2, 4) for p in (self.k_proj, self.v_proj))
        if positions is not None:
            q, k = self.rotate(q, positions), self.rotate(k, positions[:, None])
        return q, k, v

    def remember(  # type: ignore[override]
        self, cache: KVCache, q_BHND: Tensor, k_BKNSD: Tensor, v_BKNSE: Tensor, pattern: Pattern
    ) -> Tensor:
        # all depths of a token side by side: the cache counts tokens
        k, v = cache.append(k_BKNSD.flatten(3), v_BKNSE.flatten(3))
        k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (k, v))
        return self.attend(q_BHND, k, v, pattern)

    def attend(self, q_BHND: Tensor, k_BKMSD: Tensor, v_BKMSE: Tensor, pattern: Pattern) -> Tensor:
        where: dict[str, Any] = {"mask": pattern.rest, "causal": pattern.causal, "offset": pattern.offset}
        return shortcut_attend(q_BHND, k_BKMSD, v_BKMSE, **where)

    def shares(self, x_BNC: Tensor, hidden: Sequence[Tensor], *, mask: GivenMask = None) -> Tensor:
        """The share of each depth in each token's attention, (B, H, N, S).

        Raises:
            ValueError: as `forward`, or where features are joined, which leaves no choice of a depth.
        """
        if self.combine == "features":
            raise ValueError("combine='features' has no attention over depths to show")
        q, k, pattern = self._looked_at(x_BNC, hidden, mask)
        return depth_shares(q, k, mask=pattern.rest, causal=pattern.causal)

    def mix(  # type: ignore[override]
        self, x_BNC: Tensor, values_BHME: Tensor, *, hidden: Sequence[Tensor], mask: GivenMask = None
    ) -> Tensor:
        """This layer's weights on given values: one a token, (B, H, M, E), or one a key, (B, H, M S, E).

        `attention_map(layer, x, hidden=hidden)` is the map over tokens, `attention_map(layer, x, hidden=hidden,
        values=(B, H, M * S)).unflatten(-1, (M, S))` the one by depth.
        """
        q, k, pattern = self._looked_at(x_BNC, hidden, mask)
        M, S = k.shape[2:4]
        per_key = values_BHME.shape[2] == M * S
        v = values_BHME.unflatten(2, (M, S)) if per_key else values_BHME[:, :, :, None].expand(-1, -1, -1, S, -1)
        return self.attend(q, repeat_heads(k, self.num_heads), v, pattern)

    def _looked_at(self, x_BNC: Tensor, hidden: Sequence[Tensor], mask: GivenMask) -> tuple[Tensor, Tensor, Pattern]:
        self.check(x_BNC, None, None)
        pattern = self.pattern(mask, x_BNC, None, None)
        q, k, _ = self.project(x_BNC, None, self.positions(x_BNC, None, 0), hidden=hidden)
        return q, k, pattern

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, depths={self.depths}, combine={self.combine!r}"
