"""MFAFM: a map asks, two maps of the encoder answer, one with keys and the other with values.

Shape letters: B batch, C channels, O channels of the output, S channels of a skip, H height, W width, N = H W
queries, M keys, h heads of D channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.resize import resize
from saccade.ops.attend import attend
from saccade.ops.feature_maps import check_map
from saccade.ops.heads import check_heads


def to_channels(x_BSHW: Tensor, channels: int) -> Tensor:
    """The map with as many channels: means of S / C neighbours, or each repeated C / S times, or parts of both.

    Channel i is the mean of those from floor(i S / C) to ceil((i + 1) S / C).

    Args:
        x_BSHW: the map.
        channels: C.
    """
    S = x_BSHW.shape[1]
    if channels == S:
        return x_BSHW
    bins = [(i * S // channels, -(-(i + 1) * S // channels)) for i in range(channels)]
    means = [[1 / (end - first) if first <= s < end else 0.0 for s in range(S)] for first, end in bins]
    return F.conv2d(x_BSHW, torch.tensor(means, dtype=x_BSHW.dtype, device=x_BSHW.device)[..., None, None])


class AttentionFusion(nn.Module):
    """MFAFM: out = W_o attend(q, k, v) + W_x x, with q = conv3x3(x), k = conv5x5(e1), v = conv7x7(e2).

    Both skips are brought to the size and the channels of x before; e1 and e2 may have any of their own.

    Args:
        in_channels: C, of x, a multiple of the heads.
        out_channels: O, C where None.
        num_heads: h.
        key_stride: keys and values are means of so many pixels squared; 1 keeps all, as published. The attention
            costs N M C.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self, in_channels: int, out_channels: int | None = None, *, num_heads: int = 4, key_stride: int = 1
    ) -> None:
        super().__init__()
        check_heads(in_channels, num_heads)
        out_channels = in_channels if out_channels is None else out_channels
        if out_channels < 1 or key_stride < 1:
            raise ValueError(f"out_channels and key_stride must be positive, got {out_channels} and {key_stride}")
        self.in_channels, self.num_heads, self.key_stride = in_channels, num_heads, key_stride
        self.q_conv, self.k_conv, self.v_conv = (
            nn.Conv2d(in_channels, in_channels, size, padding=size // 2) for size in (3, 5, 7)
        )
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(in_channels, in_channels) for _ in range(4))
        self.fuse, self.shortcut = nn.Conv2d(in_channels, out_channels, 1), nn.Conv2d(in_channels, out_channels, 1)

    def adjusted(self, skip_BSHW: Tensor, like_BCHW: Tensor) -> Tensor:
        """A skip at the size and the channels of another map."""
        return resize(to_channels(skip_BSHW, self.in_channels), like_BCHW)

    def forward(self, x_BCHW: Tensor, keys_BSHW: Tensor, values_BSHW: Tensor) -> Tensor:
        """(B, O, H, W), of x (B, C, H, W) and two skips of any channels and sizes.

        Raises:
            ValueError: if `x` is no map of C channels, or a skip no map for each of its images.
        """
        check_map(x_BCHW, self.in_channels)
        for skip in (keys_BSHW, values_BSHW):
            if skip.ndim != 4 or len(skip) != len(x_BCHW) or not skip.numel():
                raise ValueError(f"skips must be maps (batch {len(x_BCHW)}, ...), got {tuple(skip.shape)}")
        q_BCHW = self.q_conv(x_BCHW)
        k_BCHW, v_BCHW = (
            self._pooled(conv(self.adjusted(skip, x_BCHW)))
            for conv, skip in ((self.k_conv, keys_BSHW), (self.v_conv, values_BSHW))
        )
        q_BhND, k_BhMD, v_BhMD = (
            proj(tokens.flatten(2).mT).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for proj, tokens in ((self.q_proj, q_BCHW), (self.k_proj, k_BCHW), (self.v_proj, v_BCHW))
        )
        out_BNC = self.out_proj(attend(q_BhND, k_BhMD, v_BhMD).transpose(1, 2).flatten(2))
        return self.fuse(out_BNC.mT.unflatten(2, x_BCHW.shape[2:])) + self.shortcut(x_BCHW)

    def _pooled(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW if self.key_stride == 1 else F.avg_pool2d(x_BCHW, self.key_stride, ceil_mode=True)
