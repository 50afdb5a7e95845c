"""LIVT, the local implicit video transformer: a frame at any time and of any size, asked pixel by pixel.

Shape letters: B batch, T latent frames, P times that are asked for, S frames of a window, C channels, H heads of D, h,
w sides of the latent frames, M neighbours, on a side or all, R rows and W columns of pixels that are asked for, Y, X
their rows and columns of neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.constants import numbers

#: b_i = 2^(10 i / 15) - 1
_FREQUENCIES, _OCTAVES = 16, 10


def centres(count: int, device: torch.device) -> Tensor:
    """Centres of pixels in [-1, 1], in single precision, as the authors compute them."""
    return (-1 + 1 / count) + 2 / count * torch.arange(count, device=device, dtype=torch.float32)


def nearest(size: int, out: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each of `out` pixels the nearest of `size` pixels of the same extent, and how far it lies, in half pixels."""
    at = centres(out, device)
    index = ((at + 1) * (size / 2) - 0.5).round().clamp(0, size - 1)
    return index.long(), (at - centres(size, device)[index.long()]) * size


def between(x: Tensor, out: int, rows: slice, axis: int) -> Tensor:
    """Linear interpolation along an axis at some of `out` pixels of the same extent; zeros outside."""
    size = x.shape[axis]
    at = (torch.arange(out, device=x.device, dtype=torch.float32)[rows] + 0.5) * (size / out) - 0.5
    low = at.floor()
    total: Tensor | int = 0
    for index, weight in ((low, 1 - (at - low)), (low + 1, at - low)):
        weight = weight * ((index >= 0) & (index < size))
        shape = [-1 if i == axis else 1 for i in range(x.ndim)]
        total = total + x.index_select(axis, index.long().clamp(0, size - 1)) * weight.to(x.dtype).view(shape)
    assert isinstance(total, Tensor)
    return total


class PositionBias(nn.Module):
    """A number for each displacement, linear in the sines and cosines of each coordinate by itself.

    Args:
        axes: of (t, y, x), those that are seen; the authors' code leaves x out.

    Raises:
        ValueError: if the axes are others.
    """

    def __init__(self, axes: Literal["ty", "tyx"] = "ty") -> None:
        super().__init__()
        if axes not in ("ty", "tyx"):
            raise ValueError(f"encode must be 'ty' or 'tyx', got {axes!r}")
        self.axes = axes
        self.proj = nn.Linear(2 * _FREQUENCIES * len(axes), 1)

    def part(self, axis: str, displacement: Tensor) -> Tensor:
        """What an axis adds: of the displacement's shape.

        Args:
            axis: one of `axes`.
            displacement: in single precision.
        """
        octaves = torch.arange(_FREQUENCIES, device=displacement.device) * (_OCTAVES / (_FREQUENCIES - 1))
        phases = displacement[..., None] * (2.0**octaves - 1)
        place = self.axes.index(axis)
        sine, cosine = self.proj.weight.view(2, len(self.axes), _FREQUENCIES)[:, place]
        return phases.sin().to(sine.dtype) @ sine + phases.cos().to(sine.dtype) @ cosine


class LIVT(nn.Module):
    """The decoder: q, k, v of the latent frames; each pixel weighs its neighbours in S frames, and an MLP says RGB.

        A_n = softmax over the M^2 neighbours n of a frame of ( q . k_n / sqrt(D) + bias(p - p_n) ),   for each head
        rgb = MLP [ A_n v_n of all neighbours, frames and heads; q; size of the pixel ]

    Args:
        in_channels: of the latent frames.
        base_dim: C of queries, keys and values; `num_heads` divides it.
        num_heads: H.
        radius, radius_t: neighbours on each side, in space and in time.
        hidden: widths of the MLP's inner layers.
        encode: `axes` of `PositionBias`.
        chunk: pixels that are computed at a time, for the sake of memory; at least a row.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        base_dim: int = 64,
        num_heads: int = 8,
        radius: int = 1,
        radius_t: int = 1,
        *,
        hidden: Sequence[int] = (256, 256, 256, 256),
        encode: Literal["ty", "tyx"] = "ty",
        chunk: int = 16384,
    ) -> None:
        super().__init__()
        if num_heads < 1 or base_dim < 1 or base_dim % num_heads:
            raise ValueError(f"base_dim must be a multiple of num_heads, got {base_dim} and {num_heads}")
        if min(radius, radius_t) < 0 or chunk < 1:
            raise ValueError(
                f"radius and radius_t must not be negative and chunk positive, got {radius}, {radius_t} and {chunk}"
            )
        self.num_heads, self.radius, self.radius_t, self.chunk = num_heads, radius, radius_t, chunk
        self.conv = nn.Conv3d(in_channels, base_dim, 3, padding=1)
        self.q_conv, self.k_conv, self.v_conv = (nn.Conv3d(base_dim, base_dim, 3, padding=1) for _ in range(3))
        self.bias = PositionBias(encode)
        seen = (2 * radius + 1) ** 2 * (2 * radius_t + 1)
        widths = [(seen + 1) * base_dim + 2, *hidden]
        self.mlp = nn.Sequential(
            *(layer for n, m in zip(widths, widths[1:]) for layer in (nn.Linear(n, m), nn.GELU())),
            nn.Linear(widths[-1], 3),
        )

    def forward(self, x_BCThw: Tensor, scale: float, times: Sequence[float]) -> Tensor:
        """Frames (B, len(times), 3, round(scale h), round(scale w)).

        Args:
            x_BCThw: the latent frames.
            scale: may be any positive number.
            times: from 0 to 1.

        Raises:
            ValueError: if scale or times are out of range.
        """
        if not times or not all(0 <= time <= 1 for time in times):
            raise ValueError(f"times must be numbers from 0 to 1, got {tuple(times)}")
        height, width = (round(n * scale) for n in x_BCThw.shape[3:])
        if min(height, width) < 1:
            raise ValueError(f"scale must leave a pixel of {tuple(x_BCThw.shape[3:])}, got {scale}")
        f_BCThw = self.conv(x_BCThw)
        # channels last: a neighbour is a row of memory
        q, k, v = (conv(f_BCThw).permute(0, 2, 3, 4, 1) for conv in (self.q_conv, self.k_conv, self.v_conv))
        at = [time * (x_BCThw.shape[2] - 1) for time in times]
        q_BPhwC = self._between_frames(q, at)
        windows = self._windows(at, x_BCThw.shape[2] - 1)
        seen = sorted({frame for window in windows for frame in window})
        sides = (0, 0, *[self.radius] * 4)
        k, v = F.pad(k[:, seen], sides), F.pad(v[:, seen], sides)
        places = [[seen.index(frame) for frame in window] for window in windows]
        lines = max(1, self.chunk // (width * len(at)))
        parts = [
            self._pixels(q_BPhwC, k, v, at, places, (height, width), slice(top, min(top + lines, height)))
            for top in range(0, height, lines)
        ]
        return torch.cat(parts, 2).permute(0, 1, 4, 2, 3)

    def _between_frames(self, q_BThwC: Tensor, at: Sequence[float]) -> Tensor:
        """Queries at times between frames, (B, P, h, w, C), linear; of a window of one frame what it gives alone."""
        last = q_BThwC.shape[1] - 1
        found = []
        for time in at:
            middle = round(time)
            steps = range(-min(1, self.radius_t), min(1, self.radius_t) + 1)
            shares = {step: max(0.0, 1 - abs(time - middle - step)) for step in steps}
            terms = [q_BThwC[:, min(max(middle + step, 0), last)] * share for step, share in shares.items() if share]
            found.append(sum(terms[1:], start=terms[0]))
        return torch.stack(found, 1)

    def _windows(self, at: Sequence[float], last: int) -> list[list[int]]:
        """The frames around each time, the outermost ones repeated."""
        steps = range(-self.radius_t, self.radius_t + 1)
        return [[min(max(round(time) + step, 0), last) for step in steps] for time in at]

    def _pixels(
        self,
        q_BPhwC: Tensor,
        k_BThwC: Tensor,
        v_BThwC: Tensor,
        at: Sequence[float],
        windows: list[list[int]],
        size: tuple[int, int],
        rows: slice,
    ) -> Tensor:
        """Some rows of the frames, (B, P, R, W, 3); keys and values with a border of `radius`."""
        (h, w), (height, width), device = q_BPhwC.shape[2:4], size, q_BPhwC.device
        q_BPRWC = between(between(q_BPhwC, height, rows, 2), width, slice(None), 3)
        (y_R, off_R), (x_W, off_W) = nearest(h, height, device), nearest(w, width, device)
        y_R, off_R = y_R[rows], off_R[rows]
        step_M = torch.arange(2 * self.radius + 1, device=device)

        def around(x_BThwC: Tensor) -> Tensor:
            """(B, P, S, R, Y, W, X, H, D)."""
            of_rows = x_BThwC.index_select(2, (y_R[:, None] + step_M).flatten())
            found = of_rows.index_select(3, (x_W[:, None] + step_M).flatten())
            M, heads = len(step_M), (self.num_heads, -1)
            split = found.unflatten(4, heads).unflatten(3, (-1, M)).unflatten(2, (-1, M))
            return split[:, [frame for window in windows for frame in window]].unflatten(1, (len(windows), -1))

        q_BP1R1W1HD = q_BPRWC.unflatten(4, (self.num_heads, -1))[:, :, None, :, None, :, None]
        logits = (q_BP1R1W1HD * around(k_BThwC)).sum(-1) * (q_BPRWC.shape[4] // self.num_heads) ** -0.5
        off_P = torch.tensor([time - round(time) for time in at], device=device)
        step_S = torch.arange(-self.radius_t, self.radius_t + 1, device=device)
        bias = self.bias.part("t", 2 * (off_P[:, None] - step_S))[..., None, None, None, None] + self.bias.proj.bias
        bias = bias + self.bias.part("y", off_R[:, None] - 2 * (step_M - self.radius))[..., None, None]
        if "x" in self.bias.axes:
            bias = bias + self.bias.part("x", off_W[:, None] - 2 * (step_M - self.radius))
        logits = logits + bias[..., None]
        weights_BPRWSHM = logits.permute(0, 1, 3, 5, 2, 7, 4, 6).flatten(6).softmax(-1)
        values_BPRWSMHD = around(v_BThwC).permute(0, 1, 3, 5, 2, 4, 6, 7, 8).flatten(5, 6)
        weighted = weights_BPRWSHM.mT[..., None] * values_BPRWSMHD
        cell = numbers([2 * h / height, 2 * w / width], q_BPRWC).expand(*q_BPRWC.shape[:4], 2)
        return self.mlp(torch.cat([weighted.flatten(4), q_BPRWC, cell], -1))
