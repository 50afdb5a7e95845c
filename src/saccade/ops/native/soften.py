"""A step of the running softmax in one pass of C, for scores that were made in torch.

Shape letters: B batch, H query heads, n queries and m keys of a tile, E width of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from saccade.ops.native.build import address, library

__all__ = ["soften"]


def soften(
    scores_BHnm: Tensor,
    allowed_BHnm: Tensor | None,
    top_BHn1: Tensor,
    total_BHn1: Tensor,
    out_BHnE: Tensor,
    weights_BHnm: Tensor,
) -> None:
    """Weights exp(score - top) of a tile; top, total and the sum of values so far are brought up to date.

    Args:
        scores_BHnm: float32.
        allowed_BHnm: bool, or None for all; its axes may be expanded.
        top_BHn1, total_BHn1, out_BHnE: float32, contiguous; at first -inf, 0 and 0.
        weights_BHnm: float32, contiguous, written; the scores may lie there.
    """
    _, H, n, m = weights_BHnm.shape
    if not scores_BHnm.is_contiguous():
        scores_BHnm = scores_BHnm.contiguous()
    steps: tuple[int, ...] = (0, 0, 0)
    if allowed_BHnm is not None:
        allowed_BHnm = allowed_BHnm if allowed_BHnm.stride(3) == 1 else allowed_BHnm.contiguous()
        steps = allowed_BHnm.stride()[:3]
    library().saccade_soften(
        address(scores_BHnm), address(weights_BHnm), address(top_BHn1), address(total_BHn1), address(out_BHnE),
        address(allowed_BHnm), *steps, H, n, top_BHn1.numel(), m, out_BHnE.shape[3], torch.get_num_threads(),
    )  # fmt: skip
