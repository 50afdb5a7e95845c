"""What a task's head is made of: masks of the shared maps, blocks of a scale, and the scales put together.

Shape letters: B batch, C channels, O channels of a task, H height, W width, S scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act
from saccade.layers.residual import BasicBlock
from saccade.layers.resize import resize

Gate = Literal["full", "spatial"]
Transform = Literal["conv3", "none"]
Scales = Literal["gate_concat", "concat", "softmax_sum", "sigmoid_sum"]


class SharedFeatureAttention(nn.Module):
    """SFA: F = conv(B) sigmoid(conv(B)).

    Args:
        in_channels: of B.
        out_channels: of F; as many where None.
        gate: masks of all channels, or one of all places.
        transform: "none" masks B itself.
        gate_bias: masks start as the sigmoid of this; about 1/2, and without a bias, where None.

    Raises:
        ValueError: if an option is unknown, or B itself is masked and the channels differ.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int | None = None,
        *,
        gate: Gate = "full",
        transform: Transform = "conv3",
        gate_bias: float | None = None,
    ) -> None:
        super().__init__()
        channels = in_channels if out_channels is None else out_channels
        if gate not in ("full", "spatial") or transform not in ("conv3", "none"):
            raise ValueError(
                f"gate must be 'full' or 'spatial' and transform 'conv3' or 'none', got {gate!r} and {transform!r}"
            )
        if transform == "none" and channels != in_channels:
            raise ValueError(f"out_channels must be in_channels ({in_channels}) without transform, got {channels}")
        self.gate = nn.Conv2d(
            in_channels, channels if gate == "full" else 1, 3, padding=1, bias=gate_bias is not None
        )  # fmt: skip
        if self.gate.bias is not None and gate_bias is not None:
            nn.init.constant_(self.gate.bias, gate_bias)
        self.conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False) if transform == "conv3" else None

    def mask(self, x_BCHW: Tensor) -> Tensor:
        """In (0, 1), (B, C, H, W) or (B, 1, H, W)."""
        return self.gate(x_BCHW).sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return (x_BCHW if self.conv is None else self.conv(x_BCHW)) * self.mask(x_BCHW)


class TaskBlock(nn.Module):
    """A scale's features of a task, by residual blocks, and what they say of it already.

    Args:
        in_channels, channels: before and after.
        outputs: O; 0 predicts nothing.
        blocks: how many.
    """

    def __init__(self, in_channels: int, channels: int, outputs: int, blocks: int = 2) -> None:
        super().__init__()
        widths = [in_channels, *[channels] * blocks]
        self.refine = nn.Sequential(*(BasicBlock(n, m) for n, m in zip(widths, widths[1:])))
        self.predict = nn.Conv2d(widths[-1], outputs, 1) if outputs else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.refine(x_BCHW)


class MultiScaleAttention(nn.Module):
    """MSA: maps of several scales, from fine to coarse -> the task's map at the finest size.

    Args:
        channels: of the maps.
        outputs: O.
        msa: "gate_concat": each scale behind an SFA of its own, side by side, two 1 x 1 convolutions. "concat": the
            same without gates, the field's plain head. "softmax_sum": all at one width, a score for each pixel and
            scale, and the mean with their softmax as weights; "sigmoid_sum": with their sigmoids.
        width: of the sums; the finest map's where None.
        gate, transform, gate_bias: of the SFAs.

    Raises:
        ValueError: if the option is unknown.
    """

    def __init__(
        self,
        channels: Sequence[int],
        outputs: int,
        *,
        msa: Scales = "gate_concat",
        width: int | None = None,
        gate: Gate = "full",
        transform: Transform = "conv3",
        gate_bias: float | None = None,
    ) -> None:
        super().__init__()
        if msa not in ("gate_concat", "concat", "softmax_sum", "sigmoid_sum"):
            raise ValueError(f"msa must be 'gate_concat', 'concat', 'softmax_sum' or 'sigmoid_sum', got {msa!r}")
        self.channels, self.msa = tuple(channels), msa
        self.gates = self.projections = self.scores = None
        if msa.endswith("sum"):
            width = channels[0] if width is None else width
            self.projections = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
            self.scores = nn.ModuleList(nn.Conv2d(width, 1, 3, padding=1) for _ in channels)
            self.head = nn.Sequential(conv_norm_act(width, width), nn.Conv2d(width, outputs, 1))
            return
        if msa == "gate_concat":
            self.gates = nn.ModuleList(
                SharedFeatureAttention(c, gate=gate, transform=transform, gate_bias=gate_bias) for c in channels
            )
        width = sum(channels)
        self.head = nn.Sequential(conv_norm_act(width, width, 1, bias=True), nn.Conv2d(width, outputs, 1))

    def weights(self, maps: Sequence[Tensor]) -> Tensor:
        """Of each scale in the sums, (B, S, H, W).

        Args:
            maps: projected, and of one size.

        Raises:
            ValueError: if scales are not summed.
        """
        if self.scores is None:
            raise ValueError(f"scales have weights in the sums alone, not in {self.msa!r}")
        scores_BSHW = torch.cat([score(x_BCHW) for score, x_BCHW in zip(self.scores, maps)], 1)
        return scores_BSHW.softmax(1) if self.msa == "softmax_sum" else scores_BSHW.sigmoid()

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        if [x_BCHW.shape[1] for x_BCHW in maps] != list(self.channels):
            raise ValueError(f"maps must have {self.channels} channels, got {[x.shape[1] for x in maps]}")
        if self.projections is not None:
            maps = [conv(x_BCHW) for conv, x_BCHW in zip(self.projections, maps)]
        maps = [maps[0], *(resize(x_BCHW, maps[0]) for x_BCHW in maps[1:])]
        if self.projections is not None:
            stacked_BSCHW = torch.stack(maps, 1)
            return self.head((self.weights(maps)[:, :, None] * stacked_BSCHW).sum(1))
        if self.gates is not None:
            maps = [gate(x_BCHW) for gate, x_BCHW in zip(self.gates, maps)]
        return self.head(torch.cat(maps, 1))


class TaskHead(nn.Module):
    """All that a task has of its own: for each scale an SFA and a `TaskBlock`, and the MSA over them.

    Args:
        channels: of the shared maps.
        outputs: O.
        blocks: see `TaskBlock`; their width is the map's.
        supervised: each scale makes a prediction, in training.
        msa, width, gate, transform, gate_bias: see `MultiScaleAttention` and `SharedFeatureAttention`.

    Raises:
        ValueError: if there is no output, or an option is unknown.
    """

    def __init__(
        self,
        channels: Sequence[int],
        outputs: int,
        *,
        blocks: int = 2,
        supervised: bool = True,
        msa: Scales = "gate_concat",
        width: int | None = None,
        gate: Gate = "full",
        transform: Transform = "conv3",
        gate_bias: float | None = None,
    ) -> None:
        super().__init__()
        if outputs < 1:
            raise ValueError(f"a task must have a channel at least, got {outputs}")
        self.attention = nn.ModuleList(
            SharedFeatureAttention(c, gate=gate, transform=transform, gate_bias=gate_bias) for c in channels
        )
        self.blocks = nn.ModuleList(TaskBlock(c, c, outputs if supervised else 0, blocks) for c in channels)
        self.fuse = MultiScaleAttention(
            channels, outputs, msa=msa, width=width, gate=gate, transform=transform, gate_bias=gate_bias
        )

    def forward(self, maps: Sequence[Tensor], size: tuple[int, int]) -> tuple[Tensor, list[Tensor]]:
        """The task's map at an image's size, and the predictions of each scale, in training.

        Args:
            maps: the shared ones, from fine to coarse.
            size: (height, width).
        """
        features = [block(attend(x_BCHW)) for attend, block, x_BCHW in zip(self.attention, self.blocks, maps)]
        side: list[Tensor] = []
        if self.training:
            for block, x_BCHW in zip(self.blocks, features):
                assert isinstance(block, TaskBlock)
                side += [] if block.predict is None else [block.predict(x_BCHW)]
        return F.interpolate(self.fuse(features), size, mode="bilinear"), side
