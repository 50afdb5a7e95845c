"""The layer, which puts an image's tokens in the order of its patches.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from saccade.attention.mra.operator import attend_kept, patch_order, scales_of
from saccade.layers.constants import Constants
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.pattern import Pattern, Said


class MRA(Constants, QKVAttention):
    """MRA-2 between projections; it has the parameters of `SoftmaxAttention` and takes its weights.

    Args:
        dim, num_heads, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        causal: must be False: no causal form is published, and the ranking compares all rows.
        resolutions, num_blocks, blocks_per_row, mode, first_blocks, diagonal_blocks, released_ranking: `mra_attend`'s.
        grid: height and width where the tokens are an image; blocks of s_0 tokens are then patches (4 x 8 for 32).

    Raises:
        ValueError: if `causal`, or the options do not fit.
    """

    takes: tuple[Said, ...] = ("padding",)

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
        scales = scales_of(resolutions)
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

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        order, (B, _, N, _), M = self.order_N, q_BHND.shape, k_BKMD.shape[2]
        queries, keys = pattern.real_queries(B, N), pattern.real_keys(B)
        if order is not None:
            if not N == M == len(order):
                raise ValueError(f"the grid has {len(order)} tokens, got {N} queries and {M} keys")
            q_BHND, k_BKMD, v_BKME = (x[:, :, order] for x in (q_BHND, k_BKMD, v_BKME))
            queries = keys = None if keys is None else keys[:, order]
        out, _ = attend_kept(q_BHND, k_BKMD, v_BKME, queries, keys, scale=None, **self.options)
        return out if order is None else out[:, :, order.argsort()]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, " + ", ".join(f"{name}={value}" for name, value in self.options.items())
