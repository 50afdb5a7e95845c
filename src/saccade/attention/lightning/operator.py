"""Linear attention with the decays of the heads, as functions of tensors, and the rule that gives the decays.

Shape letters: B batch, N tokens, H heads, D query/key width, E value width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saccade.ops.linear import linear_attend

Form = Literal["transnormer", "gated"]
Norm = Literal["srms", "layer", "rms"]


def lightning_attend(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    slope: Tensor | Sequence[float] | None = None,
    *,
    block_size: int | None = None,
    state: Tensor | None = None,
    return_state: bool = False,
) -> Any:
    """o_i = sum_{j<=i} exp(-slope (i - j)) (q_i . k_j) v_j.

    Args:
        q_BHND, k_BHND, v_BHNE: queries, keys and values, not scaled here.
        slope: (H,) or (H, 1, 1), >= 0 (infinity: a token sees itself alone); None for no decay.
        block_size: tokens of a block; see `linear_attend`.
        state: KV of earlier tokens (B, H, D, E); return_state: also return KV after the last.

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes do not fit.
    """
    decay = None
    if slope is not None:
        slope = torch.as_tensor(slope, device=q_BHND.device)
        if slope.shape not in ((q_BHND.shape[1],), (q_BHND.shape[1], 1, 1)):
            raise ValueError(f"slope must be (H,) or (H, 1, 1) with H = {q_BHND.shape[1]}, got {tuple(slope.shape)}")
        decay = torch.exp(-slope.flatten().double())
    return linear_attend(
        q_BHND, k_BHND, v_BHNE, decay=decay, chunk_size=block_size, state=state, return_state=return_state
    )


def decay_slopes(
    num_heads: int, layer_index: int = 0, num_layers: int = 1, rule: Literal["code", "paper"] = "code"
) -> list[float]:
    """Decay rates s_h: short reach in low layers, (almost) none in the last, which attends globally.

    "code": s_h = 2^(-8 h / H) (1 - l / (L - 1) + 1e-5), h = 1..H, l = 0..L-1. Where H is no power of two: those of
    the largest power of two P < H, then the first H - P of the entries 0, 2, 4... of those of 2 P.
    "paper": s_h = (8 h / H) (1 - l / L).

    Args:
        num_heads, num_layers: H and L.
        layer_index: l.
        rule: "code" or "paper".

    Raises:
        ValueError: if there is no head, the layer is not among the layers, or the rule is another.

    >>> decay_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    """
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if not 0 <= layer_index < num_layers:
        raise ValueError(f"layer_index must be between 0 and num_layers - 1 ({num_layers - 1}), got {layer_index}")
    if rule == "paper":
        return [8 * h / num_heads * (1 - layer_index / num_layers) for h in range(1, num_heads + 1)]
    if rule != "code":
        raise ValueError(f"rule must be 'code' or 'paper', got {rule!r}")

    def powers(heads: int) -> list[float]:
        return [2 ** (-8 * h / heads) for h in range(1, heads + 1)]

    whole = 2 ** int(math.log2(num_heads))
    slopes = powers(whole) + powers(2 * whole)[0::2][: num_heads - whole]
    factor = 1.0 if num_layers == 1 else 1 - layer_index / (num_layers - 1) + 1e-5
    return [slope * factor for slope in slopes]


@dataclass
class TransNormerOutput:
    """logits_BNV: of the next token."""

    logits_BNV: Tensor
