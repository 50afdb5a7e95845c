"""A task's decoder: Swin blocks on maps that grow, each beside what the encoder had at that size.

Shape letters: B batch, C channels, O channels of the task, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.window_attention import WindowAttention


class PatchExpand(nn.Module):
    """A map (B, H, W, C) enlarged: linear, layer norm, and the channels laid out over the pixels.

    Args:
        dim: C.
        out: of the larger map.
        factor: by which height and width grow.
    """

    def __init__(self, dim: int, out: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(dim, out * factor**2, bias=False)
        self.norm = nn.LayerNorm(out * factor**2)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        (B, H, W, _), f = x_BHWC.shape, self.factor
        laid = self.norm(self.linear(x_BHWC)).view(B, H, W, f, f, -1)
        return laid.transpose(2, 3).reshape(B, H * f, W * f, -1)


class DecoderStage(nn.Module):
    """The map and the encoder's side by side, C of both kept by a linear layer, Swin blocks, and twice the size.

    Args:
        dim: C.
        depth, num_heads, window: of the blocks; every other one is shifted, but where `shifted` is False.
        expands: False keeps the size.
        shifted, mlp_ratio, scale, drop: as the encoder's.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        window: int,
        *,
        expands: bool,
        shifted: bool,
        mlp_ratio: float,
        scale: float | None,
        drop: float,
    ) -> None:
        super().__init__()
        self.reduce = nn.Linear(2 * dim, dim)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            shift = window // 2 if shifted and i % 2 else 0
            attention = WindowAttention(dim, num_heads, window_size=window, shift=shift, scale=scale)
            self.blocks.append(PreNormBlock(attention, dim, int(mlp_ratio * dim), drop=drop, attention_drop=drop))
        self.expand = PatchExpand(dim, dim // 2, 2) if expands else None

    def forward(self, x_BHWC: Tensor, skip_BHWC: Tensor) -> Tensor:
        height, width = skip_BHWC.shape[1:3]  # below twice the coarser map where that was filled up
        x_BHWC = self.reduce(torch.cat([x_BHWC[:, :height, :width], skip_BHWC], -1))
        for block in self.blocks:
            x_BHWC = block(x_BHWC)
        return x_BHWC if self.expand is None else self.expand(x_BHWC)


class TaskDecoder(nn.Module):
    """Logits of a task from an encoder's maps (B, H, W, C), each half the size of the one before, from fine to coarse.

    Args:
        channels: of the maps, each twice the one before.
        classes: O.
        depths, num_heads, windows: blocks, heads and side of the windows at each map's size; the last one's are not
            used.
        shifted: whether the windows of a size are.
        last: the size of the result over that of the finest map.
        mlp_ratio, scale, drop: of the blocks.

    Raises:
        ValueError: if the channels do not double.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        windows: Sequence[int],
        *,
        shifted: Sequence[bool] | None = None,
        last: int = 4,
        mlp_ratio: float = 4.0,
        scale: float | None = None,
        drop: float = 0.6,
    ) -> None:
        super().__init__()
        if any(2 * fine != coarse for fine, coarse in zip(channels, channels[1:])):
            raise ValueError(f"channels must double from map to map, got {tuple(channels)}")
        shifts = [True] * len(channels) if shifted is None else list(shifted)
        sizes = range(len(channels) - 2, -1, -1)
        self.expand = PatchExpand(channels[-1], channels[-1] // 2, 2) if sizes else None
        self.stages = nn.ModuleList(
            DecoderStage(
                channels[i], depths[i], num_heads[i], windows[i], expands=i > 0, shifted=shifts[i],
                mlp_ratio=mlp_ratio, scale=scale, drop=drop,
            )
            for i in sizes
        )  # fmt: skip
        self.norm = nn.LayerNorm(channels[0])
        self.final = PatchExpand(channels[0], channels[0], last)
        self.head = nn.Conv2d(channels[0], classes, 1, bias=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """(B, O, H, W), of the finest map's size times `last`.

        Raises:
            ValueError: if there are not as many maps as `channels`.
        """
        if len(maps) != len(self.stages) + 1:
            raise ValueError(f"maps must be {len(self.stages) + 1}, got {len(maps)}")
        x_BHWC = maps[-1] if self.expand is None else self.expand(maps[-1])
        for stage, skip_BHWC in zip(self.stages, reversed(maps[:-1])):
            x_BHWC = stage(x_BHWC, skip_BHWC)
        return self.head(self.final(self.norm(x_BHWC)).permute(0, 3, 1, 2))
