"""The local attender: every fine position is a weighted mean of fixed neighbours of its coarse cell.

Shape letters: B batch, C channels, H, W coarse map, K offsets, s side of a cell in fine positions, Y = s H and
X = s W the fine map, N = Y X fine positions, G channels of the guide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.constants import numbers
from saccade.ops.deformable import gather_sum
from saccade.ops.export import exporting
from saccade.ops.feature_maps import check_map

_CROSS = ((-1, 0), (0, -1), (0, 0), (0, 1), (1, 0))
_DIAMOND = (
    (-2, 0), (-1, -1), (-1, 0), (-1, 1), (0, -2), (0, -1), (0, 0), (0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 0)
)  # fmt: skip
_STAR = (
    (-2, -2), (-2, 0), (-2, 2), (-1, -1), (-1, 0), (-1, 1), (0, -2), (0, -1), (0, 0), (0, 1), (0, 2), (1, -1), (1, 0),
    (1, 1), (2, -2), (2, 0), (2, 2),
)  # fmt: skip


def _square(radius: int) -> tuple[tuple[int, int], ...]:
    reach = range(-radius, radius + 1)
    return tuple((row, column) for row in reach for column in reach)


#: number of neighbours -> their places (rows down, columns to the right), in the order of the weights
OFFSETS = {5: _CROSS, 9: _square(1), 13: _DIAMOND, 17: _STAR, 25: _square(2)}


def neighbours(size: tuple[int, int], scale: int, offsets: int, like: Tensor) -> Tensor:
    """The coarse positions (Y X, K) that each fine position reads, as numbers in raster order, in int32.

    Args:
        size: (H, W).
        scale: s.
        offsets: K, of `OFFSETS`.
        like: of whose device they are.
    """
    down, across = numbers(OFFSETS[offsets], like, torch.int32).unbind(1)
    (H, y), (W, x) = (
        (n, torch.arange(n, device=like.device, dtype=torch.int32).repeat_interleave(scale)) for n in size
    )
    rows_YK, columns_XK = (y[:, None] + down).clamp(0, H - 1), (x[:, None] + across).clamp(0, W - 1)
    return (rows_YK[:, None] * W + columns_XK).flatten(0, 1)


def local_attend(weights_BKYX: Tensor, values_BCHW: Tensor) -> Tensor:
    """out[y, x] = sum_k A_k[y, x] V[y // s + i_k, x // s + j_k], (B, C, Y, X); the border's values go on outside.

    Time O(K Y X C), and no more memory than the output and the weights: nothing is gathered. Channels lie together in
    the output (`torch.channels_last`).

    Args:
        weights_BKYX: A, for K of `OFFSETS`, at s times the size of the values.
        values_BCHW: V.

    Raises:
        ValueError: if there are no such offsets, or the sizes do not fit.
    """
    (B, K, Y, X), (value_B, C, H, W) = weights_BKYX.shape, values_BCHW.shape
    if K not in OFFSETS:
        raise ValueError(f"there are {', '.join(map(str, OFFSETS))} offsets, got {K}")
    scale = Y // H if H else 0
    if value_B != B or scale < 1 or (scale * H, scale * W) != (Y, X):
        raise ValueError(
            "weights must be a whole number of times as large as values, of one batch, got "
            f"{tuple(weights_BKYX.shape)} and {tuple(values_BCHW.shape)}"
        )
    if exporting():
        return _one_after_the_other(weights_BKYX, values_BCHW, scale)
    dtype = torch.promote_types(values_BCHW.dtype, torch.float32)
    first_B = torch.arange(B, device=values_BCHW.device, dtype=torch.int32) * (H * W)
    index_BNK = first_B[:, None, None] + neighbours((H, W), scale, K, values_BCHW)
    rows, weights = values_BCHW.permute(0, 2, 3, 1).reshape(-1, C), weights_BKYX.permute(0, 2, 3, 1).reshape(-1, K)
    out = gather_sum(rows.to(dtype), index_BNK.flatten(0, 1), weights.to(dtype))
    return out.to(values_BCHW.dtype).view(B, Y, X, C).permute(0, 3, 1, 2)


def _one_after_the_other(weights_BKYX: Tensor, values_BCHW: Tensor, scale: int) -> Tensor:
    """`local_attend` in torch's operators, which every runtime knows: neighbour after neighbour is added."""
    H, W = values_BCHW.shape[2:]
    places = OFFSETS[weights_BKYX.shape[1]]
    reach = max(max(map(abs, place)) for place in places)
    padded = F.pad(values_BCHW, (reach,) * 4, mode="replicate")
    moved = [padded[..., reach + i : reach + i + H, reach + j : reach + j + W] for i, j in places]
    enlarged = [each.repeat_interleave(scale, 2).repeat_interleave(scale, 3) for each in moved]
    return torch.stack([weights_BKYX[:, k, None] * each for k, each in enumerate(enlarged)]).sum(0)


class LocalAttender(nn.Module):
    """A = softmax(W G + first K channels of G), and `local_attend`: a guided enlargement without queries and keys.

    Args:
        guide_channels: G.
        offsets: K, of `OFFSETS`.
        residual: add the guide's first channels to the logits, as the code does; False: the projection alone, as the
            paper says.

    Raises:
        ValueError: if there are no such offsets.
    """

    def __init__(self, guide_channels: int, offsets: int = 17, *, residual: bool = True) -> None:
        super().__init__()
        if offsets not in OFFSETS:
            raise ValueError(f"offsets must be one of {', '.join(map(str, OFFSETS))}, got {offsets}")
        self.guide_channels, self.offsets, self.residual = guide_channels, offsets, residual
        self.proj = nn.Conv2d(guide_channels, offsets, 1)

    def weights(self, guide_BGYX: Tensor) -> Tensor:
        """A (B, K, Y, X), sum 1 over the neighbours; in float32 at least until it is one.

        Raises:
            ValueError: if the guide has not G channels.
        """
        check_map(guide_BGYX, self.guide_channels)
        logits = self.proj(guide_BGYX)
        if self.residual:
            logits = added(logits, guide_BGYX)
        return logits.softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32)).to(logits.dtype)

    def forward(self, guide_BGYX: Tensor, values_BCHW: Tensor) -> Tensor:
        """(B, C, Y, X), of a guide that is a whole number of times as large as the values.

        Raises:
            ValueError: if the shapes do not fit.
        """
        return local_attend(self.weights(guide_BGYX), values_BCHW)


def added(x_BCHW: Tensor, other_BCHW: Tensor) -> Tensor:
    """x plus a map of other channels: its first ones, or with zeros for those that it has not.

    Args:
        x_BCHW: C channels.
        other_BCHW: any channels, the same size.
    """
    C, given = x_BCHW.shape[1], other_BCHW.shape[1]
    return x_BCHW + (other_BCHW[:, :C] if given >= C else F.pad(other_BCHW, (0, 0, 0, 0, 0, C - given)))
