"""MRA as a layer.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values, b tokens per
block; X, Y blocks of queries and keys, m chosen tiles, r children per side of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from saccade.attention.mra.operator import _attend, _scales, patch_order
from saccade.layers.cache import KVCache
from saccade.layers.constants import Constants
from saccade.layers.qkv_attention import QKVAttention, as_mask
from saccade.ops import masks
from saccade.ops.masks import Mask


class MRA(Constants, QKVAttention):
    """MRA-2 as a layer; it has the parameters of `SoftmaxAttention` and takes its weights.

    Args:
        dim, num_heads, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        causal: must be False: no causal form is published, and the ranking compares all rows.
        resolutions, num_blocks, blocks_per_row, mode, first_blocks, diagonal_blocks, released_ranking: `mra_attend`'s.
        grid: height and width where the tokens are an image; blocks of s_0 tokens are then patches (4 x 8 for 32).

    Raises:
        ValueError: if `causal`, or the options do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        resolutions: Sequence[int] = (32, 1),
        num_blocks: int | Sequence[int] | None = None,
        blocks_per_row: float | Sequence[float] = 8,
        mode: Literal["full", "sparse"] = "full",
        first_blocks: int = 0,
        diagonal_blocks: int = 0,
        grid: tuple[int, int] | None = None,
        released_ranking: bool = False,
        **projections: Any,
    ) -> None:
        if causal:
            raise ValueError("MRA is bidirectional: its ranking compares all rows; got causal=True")
        scales = _scales(resolutions)
        super().__init__(dim, num_heads, causal, **projections)
        self.options: dict[str, Any] = {
            "resolutions": tuple(scales),
            "num_blocks": num_blocks,
            "blocks_per_row": blocks_per_row,
            "mode": mode,
            "first_blocks": first_blocks,
            "diagonal_blocks": diagonal_blocks,
            "released_ranking": released_ranking,
        }
        rows = 2 ** (int(math.log2(scales[0])) // 2)
        self.order_N: Tensor | None
        self.constant("order_N", None if grid is None else partial(patch_order, grid, (rows, scales[0] // rows)))

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        valid = None if mask is None else masks.real_keys(mask, q_BHND.shape[0], k_BKMD.shape[2])
        return self._mix(q_BHND, k_BKMD, v_BKME, valid, valid)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """`QKVAttention.forward`; with a context, the mask is of its tokens and all queries are real."""
        if context_BMC is None:
            return super().forward(x_BNC, mask=mask, cache=cache)
        self._check(x_BNC, context_BMC, cache)
        q_BHND, k_BKMD = self._queries_and_keys(x_BNC, context_BMC, 0)
        v_BKMD = self._heads(self.v_proj(context_BMC), self.num_kv_heads)
        given = as_mask(mask, k_BKMD)
        valid = None if given is None else masks.real_keys(given, k_BKMD.shape[0], k_BKMD.shape[2])
        return self.out_proj(self._mix(q_BHND, k_BKMD, v_BKMD, None, valid).transpose(1, 2).flatten(2))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, query_valid: Tensor | None, key_valid: Tensor | None) -> Tensor:
        order = self.order_N
        if order is not None:
            if not q.shape[2] == k.shape[2] == len(order):
                raise ValueError(f"the grid has {len(order)} tokens, got {q.shape[2]} queries and {k.shape[2]} keys")
            q, k, v = q[:, :, order], k[:, :, order], v[:, :, order]
            query_valid = key_valid = None if key_valid is None else key_valid[:, order]
        out, _ = _attend(q, k, v, query_valid, key_valid, scale=None, **self.options)
        return out if order is None else out[:, :, order.argsort()]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, " + ", ".join(f"{name}={value}" for name, value in self.options.items())
