"""Dynamic Head: the task-aware DyReLU, a deformable branch, a block of the three attentions, and the head of blocks.

Shape letters: B batch, C channels, H height, W width, k = 9 taps, K = 9 or 18 masks or offsets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.deformable import deformable_conv
from saccade.ops.export import output

GROUPS = 16


HIGH_OFFSETS = ("resize", "prefix")


SCALE_GATES = ("code", "paper")


@output
@dataclass
class Pyramid:
    """What the head returns.

    Attributes:
        maps: of the input's sizes, from fine to coarse; a dict with the input's names where that was one.
    """

    maps: list[Tensor] | dict[str, Tensor]


def fit_to_coarser(maps_BKHW: Tensor, size: tuple[int, int], how: str) -> Tensor:
    """Offsets or masks (B, K, H, W) of a level for the grid (H', W') of the next coarser one.

    "resize" is bilinear with aligned corners; "prefix" takes the first K H' W' numbers of each sample.

    Args:
        maps_BKHW: offsets or masks, made on the level's own grid.
        size: (H', W').
        how: of `HIGH_OFFSETS`.
    """
    if how == "resize":
        return F.interpolate(maps_BKHW, size, mode="bilinear", align_corners=True)
    K, height, width = maps_BKHW.shape[1], *size
    return maps_BKHW.flatten(1)[:, : K * height * width].unflatten(1, (K, height, width))


class DyReLU(nn.Module):
    """Task-aware attention: the larger of two lines per channel, whose slopes and intercepts the map itself sets.

    x (B, C, H, W) -> y of that shape. With a last layer of zeros it is a ReLU.

    Args:
        channels: C.
        reduction: the hidden layer has C // reduction units, at least 1.
        slope: lambda, the range of slopes.
        slopes, intercepts: of the two lines at theta = 1/2.

    Raises:
        ValueError: if channels or reduction are below 1.
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 4,
        slope: float = 2.0,
        slopes: tuple[float, float] = (1.0, 0.0),
        intercepts: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(f"channels and reduction must be positive, got {channels} and {reduction}")
        self.slope, self.slopes, self.intercepts = slope, slopes, intercepts
        hidden = max(1, channels // reduction)
        self.down, self.up = nn.Linear(channels, hidden), nn.Linear(hidden, 4 * channels)

    def lines(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha_1, beta_1, alpha_2, beta_2, each (B, C, 1, 1)."""
        theta = F.hardsigmoid(self.up(F.relu(self.down(x_BCHW.mean((2, 3)))))) - 0.5
        a1, b1, a2, b2 = theta[:, :, None, None].chunk(4, 1)
        return (
            self.slope * a1 + self.slopes[0],
            b1 + self.intercepts[0],
            self.slope * a2 + self.slopes[1],
            b2 + self.intercepts[1],
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        alpha1, beta1, alpha2, beta2 = self.lines(x_BCHW)
        return torch.maximum(alpha1 * x_BCHW + beta1, alpha2 * x_BCHW + beta2)


class Branch(nn.Module):
    """A modulated deformable convolution 3x3 and a group norm.

    Args:
        channels: C, a multiple of `GROUPS`.
        stride: of the convolution; 2 for a finer level.
    """

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, 1)  # the weights; its places are moved
        self.norm = nn.GroupNorm(GROUPS, channels)
        nn.init.uniform_(self.conv.weight, -((9 * channels) ** -0.5), (9 * channels) ** -0.5)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x_BCHW: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        y_BCHW = deformable_conv(
            x_BCHW, offset, self.conv.weight, self.conv.bias, stride=self.conv.stride[0], padding=1, mask_BkHW=mask
        )
        # PyTorch's functional form refuses a group of a single number, which the coarsest level may be
        return torch.group_norm(y_BCHW, GROUPS, self.norm.weight, self.norm.bias, self.norm.eps)


class DyConv(nn.Module):
    """One block: a list of maps (B, C, H_l, W_l), from fine to coarse, to another of the same shapes.

    Args:
        channels: C, a multiple of 16.
        reduction: of the task-aware attention's hidden layer.
        high_offset: "resize" or "prefix", see the paper's page.
        scale_gate: "code" or "paper", likewise.

    Raises:
        ValueError: if an argument is not offered.
    """

    def __init__(
        self, channels: int = 256, reduction: int = 4, high_offset: str = "resize", scale_gate: str = "code"
    ) -> None:
        super().__init__()
        if channels < 1 or channels % GROUPS:
            raise ValueError(f"channels must be a multiple of {GROUPS}, got {channels}")
        if high_offset not in HIGH_OFFSETS:
            raise ValueError(f"high_offset must be one of {', '.join(HIGH_OFFSETS)}, got {high_offset!r}")
        if scale_gate not in SCALE_GATES:
            raise ValueError(f"scale_gate must be one of {', '.join(SCALE_GATES)}, got {scale_gate!r}")
        self.high_offset, self.scale_gate = high_offset, scale_gate
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)
        self.own, self.finer, self.coarser = Branch(channels), Branch(channels, stride=2), Branch(channels)
        self.scale = nn.Conv2d(channels, 1, 1)
        self.task = DyReLU(channels, reduction)
        nn.init.normal_(self.scale.weight, std=0.01)
        nn.init.zeros_(self.scale.bias)  # type: ignore[arg-type]

    def gate(self, f_BCHW: Tensor) -> Tensor:
        """a(f), (B, 1, 1, 1)."""
        t = self.scale(f_BCHW.mean((2, 3), keepdim=True))
        return F.hardsigmoid(F.relu(t)) if self.scale_gate == "code" else ((t + 1) / 2).clamp(0, 1)

    def branches(self, maps: Sequence[Tensor], level: int) -> dict[str, Tensor]:
        """What reaches a level from itself and its neighbours, ungated: "own", "finer", "coarser" where they exist."""
        x_BCHW = maps[level]
        offset, logits = self.offset(x_BCHW).split((18, 9), 1)
        mask = logits.sigmoid()
        found = {"own": self.own(x_BCHW, offset, mask)}
        if level:
            found["finer"] = self.finer(maps[level - 1], offset, mask)
        if level + 1 < len(maps):
            height, width = maps[level + 1].shape[2:]
            fitted = [fit_to_coarser(m, (height, width), self.high_offset) for m in (offset, mask)]
            f_BCHW = self.coarser(maps[level + 1], *fitted)
            found["coarser"] = F.interpolate(f_BCHW, tuple(x_BCHW.shape[2:]), mode="bilinear", align_corners=True)
        return found

    def scales(self, maps: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The scale-aware weights (B,) of each level's branches, for looking at."""
        levels = range(len(maps))
        return [{name: self.gate(f).flatten() for name, f in self.branches(maps, level).items()} for level in levels]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        out = []
        for level in range(len(maps)):
            gated = [self.gate(f_BCHW) * f_BCHW for f_BCHW in self.branches(maps, level).values()]
            out.append(self.task(sum(gated[1:], gated[0]) / len(gated)))
        return out


class DynamicHead(nn.Module):
    """The head: blocks one after the other.

    Args:
        channels: C, a multiple of 16.
        blocks: how many; the paper finds six enough.
        reduction, high_offset, scale_gate: of each block, see `DyConv`.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        channels: int = 256,
        blocks: int = 6,
        *,
        reduction: int = 4,
        high_offset: str = "resize",
        scale_gate: str = "code",
    ) -> None:
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks must be positive, got {blocks}")
        self.channels = channels
        self.blocks = nn.ModuleList(DyConv(channels, reduction, high_offset, scale_gate) for _ in range(blocks))

    def forward(self, maps: Sequence[Tensor] | Mapping[str, Tensor]) -> Pyramid:
        """Maps (B, C, H_l, W_l) from fine to coarse, a sequence or a dict, each level half the last, rounded up.

        Raises:
            ValueError: if channels or sizes of the maps do not fit.
        """
        levels = list(maps.values() if isinstance(maps, Mapping) else maps)
        _check_pyramid(levels, self.channels)
        for block in self.blocks:
            levels = block(levels)
        return Pyramid(dict(zip(maps, levels)) if isinstance(maps, Mapping) else levels)


def _check_pyramid(levels: list[Tensor], channels: int) -> None:
    if not levels:
        raise ValueError("maps must have at least one level, got none")
    for level, x in enumerate(levels):
        if x.ndim != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
            raise ValueError(f"maps must be (batch, {channels}, height, width), got {tuple(x.shape)} at level {level}")
        if level:
            finer = levels[level - 1].shape
            expected = (finer[0], channels, (finer[2] + 1) // 2, (finer[3] + 1) // 2)
            if tuple(x.shape) != expected:
                raise ValueError(
                    f"level {level} must be {expected}, half of level {level - 1} rounded up, got {tuple(x.shape)}"
                )
