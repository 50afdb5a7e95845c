"""The denoising U-Net whose blocks are read, numbered as in the paper, and the same reading of one of diffusers.

Blocks are numbered from 1: the first convolution and whatever follows it down to the middle, the middle, and up again;
N in all, so that block b of the way up faces block N + 1 - b of the way down.

Shape letters: B batch, C channels, H height, W width, E width of the time, N blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from math import gcd
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.positions import sinusoids
from saccade.models.backbone import check_images
from saccade.models.diffusion import Denoised
from saccade.ops.attend import attend


def group_norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups, or as many of those as divide the channels."""
    return nn.GroupNorm(gcd(32, channels), channels)


class ResidualBlock(nn.Module):
    """GN, SiLU, 3 x 3; GN scaled and moved by the time, SiLU, 3 x 3 that starts as zero; plus x.

    Args:
        in_channels, out_channels: C before and after.
        time_dim: E.
        change: "down" halves the map before the first convolution, "up" doubles it; "" leaves it.
    """

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, change: str = "") -> None:
        super().__init__()
        self.change = change
        self.norm1, self.norm2 = group_norm(in_channels), group_norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(time_dim, 2 * out_channels)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BCHW: Tensor, time_BE: Tensor) -> Tensor:
        scale, shift = self.time(F.silu(time_BE))[..., None, None].chunk(2, 1)
        h_BCHW = self.conv1(self._resized(F.silu(self.norm1(x_BCHW))))
        h_BCHW = self.conv2(F.silu(self.norm2(h_BCHW) * (1 + scale) + shift))
        return self.skip(self._resized(x_BCHW)) + h_BCHW

    def _resized(self, x_BCHW: Tensor) -> Tensor:
        if self.change == "down":
            return F.avg_pool2d(x_BCHW, 2, ceil_mode=True)
        return F.interpolate(x_BCHW, scale_factor=2.0) if self.change == "up" else x_BCHW


class MapAttention(nn.Module):
    """x + proj(attention among all places of GN x), whose projection starts as zero.

    Args:
        channels: C.
        head_dim: channels of a head; a divisor of C, or one head.
    """

    def __init__(self, channels: int, head_dim: int = 64) -> None:
        super().__init__()
        self.heads = channels // head_dim if channels % head_dim == 0 else 1
        self.norm = group_norm(channels)
        self.qkv, self.proj = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)
        for parameter in self.proj.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x_BCHW)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4).unbind(1)
        out_BCN = attend(q, k, v).transpose(2, 3).flatten(1, 2)
        return x_BCHW + self.proj(out_BCN.unflatten(2, x_BCHW.shape[2:]))


class Unit(nn.Module):
    """A numbered block: residual blocks, with attention behind the first where asked for.

    Args:
        blocks: run one after the other.
        attention: after the first of them.
    """

    def __init__(self, blocks: Sequence[nn.Module], attention: nn.Module | None = None) -> None:
        super().__init__()
        self.blocks, self.attention = nn.ModuleList(blocks), attention

    def forward(self, x_BCHW: Tensor, time_BE: Tensor) -> Tensor:
        for number, block in enumerate(self.blocks):
            x_BCHW = block(x_BCHW, time_BE)
            if number == 0 and self.attention is not None:
                x_BCHW = self.attention(x_BCHW)
        return x_BCHW


class UNet(nn.Module):
    """x_t, t -> the noise, as the unconditional U-Net of 256 x 256 pixels has it by default.

    Args:
        in_channels: of images.
        width: C of the first level.
        factors: of the width, level by level; each level has half the pixels of the one before.
        depth: residual blocks of a level on the way down; one more on the way up.
        attention: levels that have attention, from 0.
        head_dim: of attention.

    Raises:
        ValueError: if a size is not positive.
    """

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 256,
        factors: Sequence[int] = (1, 1, 2, 2, 4, 4),
        depth: int = 2,
        attention: Collection[int] = (3, 4, 5),
        head_dim: int = 64,
    ) -> None:
        super().__init__()
        if min(in_channels, width, depth, *factors) < 1 or not factors:
            raise ValueError(
                f"in_channels, width, depth and factors must be positive, got {in_channels}, {width}, {depth} and "
                f"{tuple(factors)}"
            )
        self.in_channels, self.width, E = in_channels, width, 4 * width
        self.time = nn.Sequential(nn.Linear(width, E), nn.SiLU(), nn.Linear(E, E))
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        last, skips, levels = width, [width], [0]

        def unit(before: int, after: int, level: int, *more: str) -> Unit:
            blocks = [ResidualBlock(before, after, E), *(ResidualBlock(after, after, E, change) for change in more)]
            return Unit(blocks, MapAttention(after, head_dim) if level in attention else None)

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for level, factor in enumerate(factors):
            if level:
                self.down.append(Unit([ResidualBlock(last, last, E, "down")]))
                skips.append(last)
                levels.append(level)
            for _ in range(depth):
                self.down.append(unit(last, factor * width, level))
                last = factor * width
                skips.append(last)
                levels.append(level)
        self.middle = Unit([ResidualBlock(last, last, E) for _ in range(2)], MapAttention(last, head_dim))
        channels, levels = [*skips, last], [*levels, len(factors) - 1]
        for level, factor in reversed(list(enumerate(factors))):
            for number in range(depth + 1):
                rises = level > 0 and number == depth
                self.up.append(unit(last + skips.pop(), factor * width, level, *(["up"] if rises else [])))
                last = factor * width
                channels.append(last)
                levels.append(level - rises)
        self.out = nn.Sequential(group_norm(last), nn.SiLU(), nn.Conv2d(last, in_channels, 3, padding=1))
        #: of each block, from the first, and how often its map was halved
        self.channels: tuple[int, ...] = tuple(channels)
        self.levels: tuple[int, ...] = tuple(levels)

    def forward(self, x_BCHW: Tensor, step_B: Tensor) -> Denoised:
        """The noise in x_t; t is the same for all, or one of each."""
        count = len(self.channels)
        return Denoised(self.out(self.read(x_BCHW, step_B, (count,))[count]))

    def read(
        self, x_BCHW: Tensor, step_B: Tensor, wanted: Collection[int], add: Mapping[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """The maps of the blocks that are wanted, by number; blocks after the last of them do not run.

        Args:
            x_BCHW: x_t.
            step_B: t of each.
            wanted: numbers from 1.
            add: by the number of a block of the way down, what is added to its map, resized to it, before it goes on
                and to the way up.

        Raises:
            ValueError: if `x` is no batch of images, or there is no such block.
        """
        check_images(x_BCHW, self.in_channels)
        check_blocks(wanted, len(self.channels))
        time_BE = self.time(sinusoids(step_B, self.width).to(x_BCHW.dtype))
        found: dict[int, Tensor] = {}
        skips: list[Tensor] = []
        h_BCHW, last, down = x_BCHW, max(wanted, default=0), 1 + len(self.down)
        for number, block in enumerate((self.first, *self.down, self.middle, *self.up), 1):
            if number > last:
                break
            if number > down + 1:
                skip_BCHW = skips.pop()
                if h_BCHW.shape[2:] != skip_BCHW.shape[2:]:  # of odd sizes
                    h_BCHW = F.interpolate(h_BCHW, skip_BCHW.shape[2:])
                h_BCHW = torch.cat([h_BCHW, skip_BCHW], 1)
            h_BCHW = block(h_BCHW) if number == 1 else block(h_BCHW, time_BE)
            if number <= down:
                if add is not None and number in add:
                    h_BCHW = added(h_BCHW, add[number])
                skips.append(h_BCHW)
            if number in wanted:
                found[number] = h_BCHW
        return found


class DiffusersUNet(nn.Module):
    """A `UNet2DModel` of diffusers, read by the same numbers; it runs whole, and is as before afterwards.

    Args:
        unet: the model.

    Raises:
        ValueError: if it has no such blocks.
    """

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        if not all(hasattr(unet, name) for name in ("conv_in", "down_blocks", "mid_block", "up_blocks")):
            raise ValueError(f"unet must be a UNet2DModel of diffusers, got {type(unet).__name__}")
        self.unet: Any = cast(Any, unet)  # whose attributes are diffusers'
        self.in_channels = int(self.unet.config.in_channels)
        units: list[Any] = [self.unet.conv_in]
        channels: list[int] = [int(self.unet.conv_in.out_channels)]
        levels, level = [0], 0
        for way, blocks in (
            ("down", self.unet.down_blocks),
            ("middle", [self.unet.mid_block]),
            ("up", self.unet.up_blocks),
        ):
            for block in blocks:
                resnets = list(block.resnets)
                attentions = list(getattr(block, "attentions", None) or [])
                changes = list(getattr(block, f"{way}samplers", None) or [])
                width = int(resnets[-1].out_channels)
                if way == "middle":
                    units.append(block)
                else:
                    pairs = [attentions[i] if i < len(attentions) else resnet for i, resnet in enumerate(resnets)]
                    units += pairs[:-1] if way == "up" and changes else pairs
                    channels += [width] * (len(resnets) - 1)
                    levels += [level] * (len(resnets) - 1)
                    if way == "down" and changes:
                        channels.append(width)
                        levels.append(level)
                    if changes:
                        level += 1 if way == "down" else -1
                        units.append(changes[-1])
                channels.append(width)
                levels.append(level)
        self.units = units
        self.channels: tuple[int, ...] = tuple(channels)
        self.levels: tuple[int, ...] = tuple(levels)

    def read(
        self, x_BCHW: Tensor, step_B: Tensor, wanted: Collection[int], add: Mapping[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """As `UNet.read`."""
        check_images(x_BCHW, self.in_channels)
        check_blocks(wanted, len(self.channels))
        found: dict[int, Tensor] = {}
        adding = add or {}

        def hook(number: int, module: nn.Module, inputs: Any, said: Any) -> Any:
            out = said[0] if isinstance(said, tuple) else said
            if number in adding:
                out = added(out, adding[number])
            if number in wanted:
                found[number] = out
            return (out, *said[1:]) if isinstance(said, tuple) else out

        handles = [unit.register_forward_hook(partial(hook, n)) for n, unit in enumerate(self.units, 1)]
        try:
            self.unet(x_BCHW, step_B)
        finally:
            for handle in handles:
                handle.remove()
        return found


def added(x_BCHW: Tensor, more_BCHW: Tensor) -> Tensor:
    """x plus a map of any size, resized to it bilinearly."""
    if more_BCHW.shape[2:] != x_BCHW.shape[2:]:
        more_BCHW = F.interpolate(more_BCHW, x_BCHW.shape[2:], mode="bilinear", align_corners=False)
    return x_BCHW + more_BCHW


def check_blocks(wanted: Collection[int], count: int) -> None:
    """Raise ValueError unless all are numbers of blocks, from 1 to `count`."""
    if not all(1 <= number <= count for number in wanted):
        raise ValueError(f"blocks must be numbers from 1 to {count}, got {tuple(wanted)}")
