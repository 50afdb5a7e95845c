"""A step of the running softmax in one pass of C, for scores that were made in torch.

Shape letters: B batch, H query heads, n queries and m keys of a tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.native.build import address, library

__all__ = ["soften"]


def soften(
    scores_BHnm: Tensor, allowed_BHnm: Tensor | None, top_BHn1: Tensor, total_BHn1: Tensor, room: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights exp(score - top) of a tile, and the factor exp(top before - top); top and total are brought up to date.

    Args:
        scores_BHnm: float32.
        allowed_BHnm: bool, or None for all; its axes may be expanded.
        top_BHn1, total_BHn1: float32, contiguous; at first -inf and 0.
        room: float32, contiguous, for at least as many weights; the scores may lie there.
    """
    _, H, n, m = scores_BHnm.shape
    scores = scores_BHnm.contiguous()
    weights = room.view(-1)[: scores.numel()].view(scores.shape)
    factor = torch.empty_like(top_BHn1)
    steps: tuple[int, ...] = (0, 0, 0)
    if allowed_BHnm is not None:
        allowed_BHnm = allowed_BHnm if allowed_BHnm.stride(3) == 1 else allowed_BHnm.contiguous()
        steps = allowed_BHnm.stride()[:3]
    library().saccade_soften(
        address(scores), address(weights), address(top_BHn1), address(total_BHn1), address(factor),
        address(allowed_BHnm), *steps, H, n, top_BHn1.numel(), m, torch.get_num_threads(),
    )  # fmt: skip
    return weights, factor
