"""How two feature maps become one where nothing was learned for it.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

#: stands for 0 in a denominator
_LEAST = 1e-10


def l1_rule(a_BCHW: Tensor, b_BCHW: Tensor, *, window: int = 3) -> Tensor:
    """(A_a a + A_b b) / (A_a + A_b) with the activity A = the mean over a window of the sum over channels of |f|.

    The window goes on past the border by zeros; A is one number per position for all channels.

    Args:
        a_BCHW, b_BCHW: maps of one shape.
        window: side of the box, odd.

    Raises:
        ValueError: if the window is even or not positive.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window must be odd, got {window}")
    first, second = (
        F.avg_pool2d(f.abs().sum(1, keepdim=True), window, 1, window // 2).clamp(min=_LEAST) for f in (a_BCHW, b_BCHW)
    )
    return (first * a_BCHW + second * b_BCHW) / (first + second)


def addition(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """(a + b) / 2.

    Args:
        a_BCHW, b_BCHW: maps of one shape.
    """
    return (a_BCHW + b_BCHW) / 2


def softmax_rule(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Weights exp(n_a), exp(n_b) over their sum, per channel; n is a map between its least and largest channel.

    Args:
        a_BCHW, b_BCHW: maps of one shape.
    """

    def between(f_BCHW: Tensor) -> Tensor:
        least, most = f_BCHW.aminmax(dim=1, keepdim=True)
        return (f_BCHW - least) / (most - least).clamp(min=_LEAST)

    weight = (between(a_BCHW) - between(b_BCHW)).sigmoid()  # the softmax of two
    return weight * a_BCHW + (1 - weight) * b_BCHW


def channel_max(a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
    """Weights w_a / (w_a + w_b), w the largest channel of a position.

    Args:
        a_BCHW, b_BCHW: maps of one shape, positive as the encoder's are.
    """
    first, second = (f.amax(1, keepdim=True).clamp(min=_LEAST) for f in (a_BCHW, b_BCHW))
    return (first * a_BCHW + second * b_BCHW) / (first + second)


RULES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": l1_rule,
    "addition": addition,
    "softmax": softmax_rule,
    "channel-max": channel_max,
}
