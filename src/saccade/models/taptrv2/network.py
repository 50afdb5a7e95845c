"""TAPTRv2: a backbone and a deformable encoder for each frame, and points that go through windows of frames.

Shape letters: B videos, T frames, N points, C channels, H, W sides of a map, L levels, F pixels of all levels, G = B T,
K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saccade.layers.deformable_attention import MSDeformableAttention
from saccade.layers.norms import freeze_norms
from saccade.layers.resnet import ResNetTrunk
from saccade.models.backbone import maps_of
from saccade.models.taptrv2.decoder import DecoderLayer, TrackDecoder, _mlp
from saccade.models.tracking import Tracker, TrackOutput, check_video
from saccade.ops.autocast import working_dtype
from saccade.ops.deformable import sample
from saccade.ops.deformable.points import Size

#: frames whose maps are made at once, and beyond which the content of some windows is not handed on
CLIP = 24
#: the size of a point's box at first, and its logits: visible
_SIZE, _VISIBLE = 0.5, 1


def windows(frames: int, length: int, stride: int) -> list[range]:
    """The frames of each window; the last one ends with the video.

    Args:
        frames: of the video.
        length: of a window, at most.
        stride: from one window's start to the next one's.

    >>> [(w.start, w.stop) for w in windows(7, 4, 2)]
    [(0, 4), (2, 6), (3, 7)]
    """
    starts = list(range(0, max(1, frames - length + stride), stride))
    return [range(min(start, max(0, frames - length)), min(start + length, frames)) for start in starts]


def sine_places(height: int, width: int, dim: int, temperature: float, like: Tensor) -> Tensor:
    """Sines of rows, then of columns, counted from 1 and scaled to (0, 2 pi], (H W, dim)."""
    line_H, line_W = (
        torch.arange(1, n + 1, device=like.device, dtype=working_dtype(like.dtype)) / (n + 1e-6) * (2 * math.pi)
        for n in (height, width)
    )
    half = dim // 2
    rate = temperature ** (2 * torch.arange(half // 2, device=like.device, dtype=line_H.dtype) / half)
    of_rows, of_columns = (
        torch.stack([(line[:, None] / rate).sin(), (line[:, None] / rate).cos()], -1).flatten(1)
        for line in (line_H, line_W)
    )
    return torch.cat([of_rows.repeat_interleave(width, 0), of_columns.repeat(height, 1)], 1).to(like.dtype)


class EncoderLayer(nn.Module):
    """Pixels of all levels attend deformably to those around them: LN(x + attention), LN(x + FFN).

    Args:
        dim, num_heads, num_levels, num_points: of the attention.
        feedforward: inner width.
        dropout: of both branches.
    """

    def __init__(
        self, dim: int, num_heads: int, num_levels: int, num_points: int, feedforward: int, dropout: float
    ) -> None:
        super().__init__()
        self.attention = MSDeformableAttention(dim, num_heads, num_levels, num_points)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feedforward, dim)
        )
        self.norm1, self.norm2, self.drop = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, x_GFC: Tensor, place_FC: Tensor, reference_GFL2: Tensor, shapes: Sequence[Size]) -> Tensor:
        x_GFC = self.norm1(x_GFC + self.drop(self.attention(x_GFC + place_FC, reference_GFL2, x_GFC, shapes)))
        return self.norm2(x_GFC + self.drop(self.feedforward(x_GFC)))


class State(NamedTuple):
    """All that is known of the points in all frames.

    Attributes:
        content: (B, T, N, C).
        boxes: (B, T, N, 4) after each decoder layer; the last are those that are gone on from.
        moved: (B, T, N, 2) after the APU of each layer.
        logits: (B, T, N, K) after each layer.
    """

    content: Tensor
    boxes: list[Tensor]
    moved: list[Tensor]
    logits: list[Tensor]


class TAPTRv2(Tracker):
    """Points followed through a video; by default as published.

    Args:
        dim: C.
        num_heads, num_points, feedforward, dropout, temperature, by_box, transposed: see `DecoderLayer`.
        encoder_layers, decoder_layers: how many.
        encoder_points: samples of the encoder on each level; as many as the decoder's where None.
        window, stride: frames of a window, and from one to the next.
        content_dropout: of what a window hands on.
        groups: of the group norm behind each map's projection.
        classes: K.
        backbone: gives maps from fine to coarse; a ResNet with frozen norms where None.
        channels: of these maps; the backbone's own `channels` where None.
        depth, width, stages: of the ResNet.
        image_size: to which `predict` scales frames.

    Raises:
        ValueError: if numbers are out of range or do not fit together.
    """

    slug = "taptrv2"

    def __init__(
        self,
        dim: int = 256,
        *,
        num_heads: int = 8,
        num_points: int = 4,
        feedforward: int = 2048,
        encoder_layers: int = 2,
        decoder_layers: int = 5,
        encoder_points: int | None = None,
        window: int = 8,
        stride: int = 4,
        temperature: float = 10.0,
        dropout: float = 0.0,
        content_dropout: float = 0.6,
        groups: int = 32,
        classes: int = 3,
        by_box: bool = False,
        transposed: bool = False,
        backbone: nn.Module | None = None,
        channels: Sequence[int] | None = None,
        depth: int = 50,
        width: int = 64,
        stages: int = 4,
        image_size: tuple[int, int] = (512, 512),
    ) -> None:
        super().__init__()
        if not 1 <= stride <= window or classes < 2 or min(encoder_layers, decoder_layers - 1) < 0 or dim % 4:
            raise ValueError(
                "stride must be from 1 to window, classes at least 2, layers not negative and dim a multiple of 4, got "
                f"{stride}, {window}, {classes}, {encoder_layers}, {decoder_layers} and {dim}"
            )
        self.backbone = freeze_norms(ResNetTrunk(depth, width=width, stages=stages)) if backbone is None else backbone
        found = getattr(self.backbone, "channels", None) if channels is None else channels
        if not found:
            raise ValueError("channels must be given for a backbone that has no attribute of that name")
        self.channels: tuple[int, ...] = tuple(found)
        self.window, self.stride, self.classes = window, stride, classes
        self.temperature, self.image_size = temperature, image_size
        levels = len(self.channels)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, dim, 1), nn.GroupNorm(groups, dim)) for c in self.channels
        )
        self.level = nn.Parameter(torch.randn(levels, dim))
        self.encoder = nn.ModuleList(
            EncoderLayer(
                dim, num_heads, levels, num_points if encoder_points is None else encoder_points, feedforward, dropout
            )
            for _ in range(encoder_layers)
        )
        self.first = nn.Linear(levels * dim, dim)
        self.decoder = TrackDecoder(
            dim, num_heads, levels, num_points, layers=decoder_layers, classes=classes, feedforward=feedforward,
            dropout=dropout, temperature=temperature, by_box=by_box, transposed=transposed,
        )  # fmt: skip
        self.hand_on = _mlp(3 * dim, dim, dim)
        self.content_drop = nn.Dropout(content_dropout)

    def as_released(self) -> None:
        for module in self.modules():
            if isinstance(module, DecoderLayer):
                module.transposed = True

    def encode(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
        """Pixels of all levels (G, F, C) of maps (G, C_l, H, W), and the levels' sizes."""
        projected = [conv(x_GCHW) for conv, x_GCHW in zip(self.projections, maps)]
        shapes: list[Size] = [(x_GCHW.shape[2], x_GCHW.shape[3]) for x_GCHW in projected]
        x_GFC = torch.cat([x_GCHW.flatten(2).mT for x_GCHW in projected], 1)
        places, middles = [], []
        for number, (height, width) in enumerate(shapes):
            places.append(
                sine_places(height, width, x_GFC.shape[2], self.temperature, x_GFC) + self.level[number].to(x_GFC.dtype)
            )
            y, x = ((torch.arange(n, device=x_GFC.device) + 0.5) / n for n in (height, width))
            middles.append(torch.stack([x.repeat(height), y.repeat_interleave(width)], -1))
        reference_GFL2 = torch.cat(middles)[None, :, None].expand(len(x_GFC), -1, len(shapes), -1)
        for layer in self.encoder:
            x_GFC = layer(x_GFC, torch.cat(places), reference_GFL2, shapes)
        return x_GFC, shapes

    def start(self, memory_BTFC: Tensor, shapes: Sequence[Size], points_BN3: Tensor) -> State:
        """What is known of points where they are given: content from all levels, the place, and that they are seen."""
        B, T, _, C = memory_BTFC.shape
        given_BN = points_BN3[..., 0].round().long()
        at_BN2 = points_BN3[..., 1:].to(working_dtype(points_BN3.dtype))
        found = []
        for (height, width), level in zip(shapes, memory_BTFC.split([h * w for h, w in shapes], 2)):
            # the frames below each other, so that one reading finds the frame of each point
            tall = level.reshape(B, T * height, width, C)
            x, y = at_BN2[..., 0].clamp(0, 1) * (width - 1), at_BN2[..., 1].clamp(0, 1) * (height - 1)
            pixels_BN12 = torch.stack([x, y + given_BN * height], -1)[:, :, None]
            found.append(sample(tall, pixels_BN12, padding="border"))
        content_BTNC = self.first(torch.cat(found, -1))[:, None].expand(-1, T, -1, -1)
        box_BTN4 = torch.cat([at_BN2, torch.full_like(at_BN2, _SIZE)], -1)[:, None].expand(-1, T, -1, -1)
        logits = torch.arange(self.classes, device=box_BTN4.device).eq(_VISIBLE).to(content_BTNC.dtype)
        layers = len(self.decoder.layers)
        visible = logits.expand(*box_BTN4.shape[:3], -1)
        return State(content_BTNC, [box_BTN4] * layers, [box_BTN4[..., :2]] * layers, [visible] * layers)

    def track(self, memory_BTFC: Tensor, shapes: Sequence[Size], points_BN3: Tensor) -> State:
        """The points in all frames, window by window.

        Args:
            memory_BTFC, shapes: of `encode`, for each frame.
            points_BN3: frame, x and y.
        """
        state = self.start(memory_BTFC, shapes, points_BN3)
        initial_BTNC, T = state.content, memory_BTFC.shape[1]
        frame_T1 = torch.arange(T, device=memory_BTFC.device)[:, None]
        given_B1N = points_BN3[..., 0].round().long()[:, None]
        tracked_BTN, update_BTN = frame_T1 >= given_B1N, frame_T1 > given_B1N
        for number, frames in enumerate(windows(T, self.window, self.stride)):
            part = slice(frames.start, frames.stop)
            content_BTNC, box_BTN4 = state.content[:, part], state.boxes[-1][:, part]
            update = update_BTN[:, part]
            said = self.decoder(
                content_BTNC, box_BTN4.detach() if self.training else box_BTN4, memory_BTFC[:, part], shapes, update,
                tracked_BTN[:, part],
            )  # fmt: skip
            step = self.hand_on(torch.cat([initial_BTNC[:, part], content_BTNC, said.content], -1))
            handed_BTNC = content_BTNC + self.content_drop(step)
            copies = T <= CLIP or number % (T // CLIP) > 0
            state = State(
                _written(state.content, handed_BTNC, update, frames, on=copies),
                [_written(old, new, update, frames) for old, new in zip(state.boxes, said.boxes)],
                [_written(old, new, update, frames) for old, new in zip(state.moved, said.moved)],
                [_written(old, new.to(old.dtype), update, frames) for old, new in zip(state.logits, said.logits)],
            )
        return state

    def forward(self, video: Tensor, points: Tensor) -> TrackOutput:
        """Where the points are.

        Args:
            video: (B, T, 3, H, W), as ImageNet's images are normalised.
            points: (B, N, 3): the frame in which each is given, from 0, and x and y in it from 0 to 1.

        Raises:
            ValueError: if they are no videos and points.
        """
        check_video(video, points)
        B, T = video.shape[:2]
        clips = [self.encode(maps_of(self.backbone(clip))) for clip in video.flatten(0, 1).split(CLIP)]
        memory_BTFC, shapes = torch.cat([memory for memory, _ in clips]).unflatten(0, (B, T)), clips[0][1]
        return self.output(self.track(memory_BTFC, shapes, points), video.dtype)

    def output(self, state: State, dtype: torch.dtype) -> TrackOutput:
        """What a state says."""
        *early, logits = state.logits
        steps = [*(box[..., :2] for box in state.boxes[:-1]), *state.moved]
        return TrackOutput(
            state.boxes[-1][..., :2].to(dtype),
            logits[..., _VISIBLE] - logits[..., 0],
            logits,
            steps if self.training else None,
            early if self.training else None,
        )


def _written(old: Tensor, new: Tensor, update_BTN: Tensor, frames: Any, *, on: bool = True) -> Tensor:
    """A window's frames where they may be changed, and its last one for all that come after it, where `on`."""
    inside = torch.where(update_BTN[..., None], new, old[:, frames.start : frames.stop])
    after = old[:, frames.stop :]
    if on and after.shape[1]:
        after = torch.where(update_BTN[:, -1:, :, None], new[:, -1:], after)
    return torch.cat([old[:, : frames.start], inside, after], 1)
