"""Convolution whose taps are moved: the map read at each tap's point, then one matrix product.

Shape letters: B batch, H, W height and width, C channels that come in, E that go out, k kernel; G groups of channels
with points of their own, N taps of all positions, K = k k C numbers that a position reads, O offsets of a position.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.deformable.points import sample


def deformable_conv(
    x_BCHW: Tensor,
    offset_BOHW: Tensor,
    weight_ECkk: Tensor,
    bias_E: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    mask_BkHW: Tensor | None = None,
) -> Tensor:
    """Convolution whose taps are moved, y(p) = b + sum_k w_k m_k(p) x(p stride - padding + k dilation + offset_k(p)).

    Args:
        x_BCHW: read as zeros outside.
        offset_BOHW: O = 2 g k k numbers per output position in pixels, of g groups of channels of x; for each group
            and tap (row-major) dy, then dx.
        weight_ECkk, bias_E: of an ordinary convolution.
        stride, padding, dilation: of the convolution, the same on both axes.
        mask_BkHW: m, (B, g k k, H', W'); ones where None.

    Returns:
        (B, E, H', W'), channels-last where x is.

    Raises:
        ValueError: if the offsets are not those of the output's size.
    """
    B, C, H, W = x_BCHW.shape
    E, _, kh, kw = weight_ECkk.shape
    taps = kh * kw
    out = [(n + 2 * padding - dilation * (k - 1) - 1) // stride + 1 for n, k in ((H, kh), (W, kw))]
    g = offset_BOHW.shape[1] // (2 * taps)
    if not g or tuple(offset_BOHW.shape) != (B, 2 * g * taps, *out) or C % g:
        raise ValueError(f"offset must be ({B}, {2 * taps} per group, {out[0]}, {out[1]}), got {offset_BOHW.shape}")
    offsets = offset_BOHW.to(working_dtype(offset_BOHW.dtype)).view(B, g, taps, 2, *out)
    y, x = (torch.arange(n, device=x_BCHW.device) * stride - padding for n in out)
    dy, dx = (torch.arange(k, device=x_BCHW.device) * dilation for k in (kh, kw))
    rows = offsets[:, :, :, 0] + y[:, None] + dy.repeat_interleave(kw)[:, None, None]
    columns = offsets[:, :, :, 1] + x + dx.repeat(kh)[:, None, None]
    # a query is a position and a tap; channels of a position's taps lie together afterwards
    points_BNG2 = torch.stack([columns, rows], -1).permute(0, 3, 4, 2, 1, 5).flatten(1, 3)
    columns_BNC = sample(x_BCHW.permute(0, 2, 3, 1), points_BNG2)
    if mask_BkHW is not None:
        factors = mask_BkHW.view(B, g, taps, *out).permute(0, 3, 4, 2, 1).flatten(1, 3)
        columns_BNC = (columns_BNC.unflatten(2, (g, -1)) * factors[..., None]).flatten(2)
    # as a 1 x 1 convolution, for which PyTorch has the faster matrix product on many CPUs
    columns_BKHW = columns_BNC.reshape(B, *out, taps * C).permute(0, 3, 1, 2)
    y_BEHW = F.conv2d(columns_BKHW, weight_ECkk.permute(0, 2, 3, 1).reshape(E, -1, 1, 1), bias_E)
    last = x_BCHW.is_contiguous(memory_format=torch.channels_last) and not x_BCHW.is_contiguous()
    return y_BEHW if last else y_BEHW.contiguous()
