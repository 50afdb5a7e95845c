"""Rectified SpaAttn as a layer, which puts the visual tokens of a grid along a Hilbert curve.

Shape letters: B batch, H query heads, K key heads, N tokens (M the same, as keys), C channels, D head dim, E width of
values.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from saccade.attention.rectified_spaattn.operator import Tail, rectified_spaattn_attend
from saccade.layers.constants import Constants
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.hilbert import gilbert_order, neighbor_blocks
from saccade.ops.pattern import Pattern, Said


def _neighbors(grid: tuple[int, int, int], block_size: tuple[int, int]) -> Tensor:
    return neighbor_blocks(grid, gilbert_order(grid), block_size)


class RectifiedSpaAttention(Constants, QKVAttention):
    """Self-attention by `rectified_spaattn_attend`, with projections.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: see `QKVAttention`;
            `causal` must be False, and rotary positions are off (a model's are those of its grid).
        text_tokens, drop_rate, top_k, cdf_threshold, block_q, block_k, first_frame_blocks, ipar, gapr, tail: see
            `rectified_spaattn_attend`.
        grid: (frames, rows, columns) of the visual tokens, which come in that order: they are put along the
            generalised Hilbert curve for the attention, and blocks that touch in the grid are critical.

    Raises:
        ValueError: if an option is out of range.
    """

    order: Tensor | None
    neighbors: Tensor | None
    takes: tuple[Said, ...] = ("padding",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        text_tokens: int = 0,
        drop_rate: float = 0.8,
        top_k: int | None = None,
        cdf_threshold: float = 0.3,
        block_q: int = 128,
        block_k: int = 128,
        first_frame_blocks: int = 0,
        ipar: bool = True,
        gapr: bool = True,
        tail: Tail = "zeros",
        grid: tuple[int, int, int] | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: bool = False,
        rope_base: float = 10000.0,
        qkv_bias: bool = False,
        proj_bias: bool = False,
    ) -> None:
        super().__init__(
            dim, num_heads, causal, num_kv_heads=num_kv_heads, head_dim=head_dim, rope=rope, rope_base=rope_base,
            qkv_bias=qkv_bias, proj_bias=proj_bias,
        )  # fmt: skip
        if causal:
            raise ValueError("rectified block-sparse attention is bidirectional, got causal=True")
        self.options: dict[str, Any] = {
            "text_tokens": text_tokens, "drop_rate": drop_rate, "top_k": top_k, "cdf_threshold": cdf_threshold,
            "block_q": block_q, "block_k": block_k, "first_frame_blocks": first_frame_blocks, "ipar": ipar,
            "gapr": gapr, "tail": tail,
        }  # fmt: skip
        # a call on text alone raises for whatever is out of range
        token = torch.zeros(1, num_heads, max(1, text_tokens), self.head_dim)
        rectified_spaattn_attend(token, token, token, **self.options)
        self.constant("order", None if grid is None else partial(gilbert_order, grid))
        self.constant("neighbors", None if grid is None else partial(_neighbors, grid, (block_q, block_k)))

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        valid = pattern.valid_BM
        if self.order is None:
            return rectified_spaattn_attend(q_BHND, k_BKMD, v_BKME, mask=valid, **self.options)
        visual, text = self.order.shape[0], q_BHND.shape[2] - self.order.shape[0]
        if text != self.options["text_tokens"]:
            expected = visual + self.options["text_tokens"]
            raise ValueError(f"x must have the grid's {visual} tokens and the text's, {expected}, got {visual + text}")
        order = torch.cat([self.order, torch.arange(visual, visual + text, device=self.order.device)])
        out = rectified_spaattn_attend(
            *(x.index_select(2, order) for x in (q_BHND, k_BKMD, v_BKME)),
            mask=None if valid is None else valid[:, order],
            neighbors=self.neighbors,
            **self.options,
        )
        return out.index_select(2, order.argsort())

    def check(self, x_BNC: Tensor, context_BMC: Tensor | None, cache: Any) -> None:
        if context_BMC is not None:
            raise ValueError("rectified block-sparse attention is self-attention: it takes no context")
        super().check(x_BNC, context_BMC, cache)
