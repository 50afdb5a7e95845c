"""The decoder: points in the frames of a window ask the frames, each other's times, and each other.

Shape letters: B videos, T frames of a window, N points, C channels, F pixels of all levels, A samples of a point, K
classes, i layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade import masks
from saccade.layers.placed_attention import PlacedAttention
from saccade.models.taptrv2.attention import KeyAwareDeformableAttention, PositionUpdate, level_sizes, sine_embedding
from saccade.ops.boxes import inverse_sigmoid
from saccade.ops.deformable.points import Size

#: what the logit of a coordinate keeps from 0 and 1
EPS = 1e-3
#: numbers of the sine embedding for a coordinate
_SINES = 128
#: the probability that classes start at
_PRIOR = 0.01


def _mlp(*widths: int) -> nn.Sequential:
    """Linears, and ReLUs between."""
    layers = [layer for n, m in zip(widths, widths[1:]) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Tracked(NamedTuple):
    """Points in a window.

    Attributes:
        x: (B, T, N, C), their content.
        box: (B, T, N, 4), where they are, and a size without a meaning.
        delta: (B, T, N, 2), what the APU moved them by.
    """

    x: Tensor
    box: Tensor
    delta: Tensor


class DecoderLayer(nn.Module):
    """Key-aware attention to the own frame and APU; attention over the frames of a point; over the points of a frame.

    Args:
        dim, num_heads, num_levels, num_points, by_box: of `KeyAwareDeformableAttention`.
        feedforward: inner width.
        dropout: of each branch.
        temperature: of the sine embedding.
        transposed: the APU divides offsets (x, y) by (height, width), as released.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        *,
        feedforward: int = 2048,
        dropout: float = 0.0,
        temperature: float = 10.0,
        by_box: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature, self.transposed = temperature, transposed
        self.cross_attention = KeyAwareDeformableAttention(dim, num_heads, num_levels, num_points, by_box=by_box)
        self.update = PositionUpdate(dim, num_heads * num_levels * num_points)
        self.place = _mlp(4 * _SINES, dim, dim)
        self.time_attention, self.point_attention = (PlacedAttention(dim, num_heads) for _ in range(2))
        self.feedforward = nn.Sequential(
            nn.Linear(dim, feedforward), nn.ReLU(), nn.Dropout(dropout), nn.Linear(feedforward, dim)
        )
        self.norm1, self.norm_time, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(4))
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        x_BTNC: Tensor,
        place_BTNC: Tensor,
        box_BTN4: Tensor,
        memory_BTFC: Tensor,
        shapes: Sequence[Size],
        update_BTN: Tensor,
        tracked_BTN: Tensor,
    ) -> Tracked:
        """
        Args:
            x_BTNC, place_BTNC, box_BTN4: content, embedded positions, and positions of the points.
            memory_BTFC: pixels of all levels of each frame.
            shapes: (height, width) of each level.
            update_BTN: bool, whose positions may move.
            tracked_BTN: bool, which there are already; those see each other, and the others each other.
        """
        B, T, N, _ = x_BTNC.shape
        looked = self.cross_attention(
            (x_BTNC + place_BTNC).flatten(0, 1), box_BTN4.flatten(0, 1)[:, :, None], memory_BTFC.flatten(0, 1), shapes
        )
        x_BTNC = self.norm1(x_BTNC + self.drop(looked.out).unflatten(0, (B, T)))
        sizes = level_sizes(
            shapes, self.cross_attention.num_points, looked.offsets, transposed=self.transposed
        )  # fmt: skip
        moves_BTNA2 = (looked.offsets / sizes).flatten(2, 3).unflatten(0, (B, T))
        delta_BTN2 = self.update(looked.logits.flatten(2).unflatten(0, (B, T)), moves_BTNA2)
        before_BTN2 = box_BTN4[..., :2]
        centre = inverse_sigmoid(
            before_BTN2 + delta_BTN2.to(box_BTN4.dtype), EPS
        ).sigmoid()  # which stays in the picture
        box_BTN4 = torch.where(update_BTN[..., None], torch.cat([centre, box_BTN4[..., 2:]], -1), box_BTN4)
        place_BTNC = self.place(sine_embedding(box_BTN4, _SINES, self.temperature).to(x_BTNC.dtype))

        x_BNTC, place_BNTC, tracked_BNT = (y.transpose(1, 2) for y in (x_BTNC, place_BTNC, tracked_BTN))
        alike = (tracked_BNT[..., None] == tracked_BNT[..., None, :]).flatten(0, 1)[:, None]
        over_time = self.time_attention(x_BNTC.flatten(0, 1), place_BNTC.flatten(0, 1), mask=masks.dense(alike))
        x_BTNC = self.norm_time(x_BTNC + self.drop(over_time).unflatten(0, (B, N)).transpose(1, 2))
        alike = (tracked_BTN[..., None] == tracked_BTN[..., None, :]).flatten(0, 1)[:, None]
        over_points = self.point_attention(x_BTNC.flatten(0, 1), place_BTNC.flatten(0, 1), mask=masks.dense(alike))
        x_BTNC = self.norm2(x_BTNC + self.drop(over_points).unflatten(0, (B, T)))
        x_BTNC = self.norm3(x_BTNC + self.drop(self.feedforward(x_BTNC)))
        return Tracked(x_BTNC, box_BTN4, box_BTN4[..., :2] - before_BTN2)


class Decoded(NamedTuple):
    """What the decoder says of a window.

    Attributes:
        content: (B, T, N, C), what the last layer says positions and classes by.
        boxes, logits: of each layer, (B, T, N, 4) and (B, T, N, K).
        moved: (B, T, N, 2) of each layer, where the APU put the points.
    """

    content: Tensor
    boxes: list[Tensor]
    logits: list[Tensor]
    moved: list[Tensor]


class TrackDecoder(nn.Module):
    """The layers, what each says of positions and classes, and what each starts from.

    Args:
        dim, num_heads, num_levels, num_points, feedforward, dropout, temperature, by_box, transposed: of the layers.
        layers: how many.
        classes: K.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        num_levels: int = 4,
        num_points: int = 4,
        *,
        layers: int = 5,
        classes: int = 3,
        feedforward: int = 2048,
        dropout: float = 0.0,
        temperature: float = 10.0,
        by_box: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.layers = nn.ModuleList(
            DecoderLayer(
                dim, num_heads, num_levels, num_points, feedforward=feedforward, dropout=dropout,
                temperature=temperature, by_box=by_box, transposed=transposed,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.place = _mlp(4 * _SINES, dim, dim)
        self.renew = _mlp(2 * dim, dim, dim)
        self.fuse = _mlp(dim + 2 * _SINES, dim, dim, dim)
        self.box_heads = nn.ModuleList(_mlp(dim, dim, dim, 4) for _ in range(layers))
        self.class_heads = nn.ModuleList(nn.Linear(dim, classes) for _ in range(layers))
        for box_head, class_head in zip(self.box_heads, self.class_heads):
            assert isinstance(box_head, nn.Sequential) and isinstance(class_head, nn.Linear)
            last = box_head[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            nn.init.constant_(class_head.bias, math.log(_PRIOR / (1 - _PRIOR)))

    def forward(
        self,
        content_BTNC: Tensor,
        box_BTN4: Tensor,
        memory_BTFC: Tensor,
        shapes: Sequence[Size],
        update_BTN: Tensor,
        tracked_BTN: Tensor,
    ) -> Decoded:
        """
        Args:
            content_BTNC, box_BTN4: what is known of the points.
            memory_BTFC, shapes, update_BTN, tracked_BTN: as in `DecoderLayer`.
        """
        x_BTNC = content_BTNC
        boxes, logits, moved = [], [], []
        for i, (layer, box_head, class_head) in enumerate(zip(self.layers, self.box_heads, self.class_heads)):
            if i:
                x_BTNC = x_BTNC + self.renew(torch.cat([x_BTNC, content_BTNC], -1))
            place_BTNC = self.place(sine_embedding(box_BTN4, _SINES, self.temperature).to(x_BTNC.dtype))
            x_BTNC, at_BTN4, delta_BTN2 = layer(
                x_BTNC, place_BTNC, box_BTN4, memory_BTFC, shapes, update_BTN, tracked_BTN
            )  # fmt: skip
            e_BTNC = sine_embedding(delta_BTN2, _SINES, self.temperature).to(x_BTNC.dtype)
            f_BTNC = self.fuse(torch.cat([x_BTNC, e_BTNC], -1))
            found_BTN4 = (inverse_sigmoid(at_BTN4, EPS) + box_head(f_BTNC).to(at_BTN4.dtype)).sigmoid()
            found_BTN4 = torch.where(update_BTN[..., None], found_BTN4, box_BTN4)
            boxes.append(found_BTN4)
            logits.append(class_head(f_BTNC))
            moved.append(at_BTN4[..., :2])
            box_BTN4 = found_BTN4.detach() if self.training else found_BTN4
        return Decoded(f_BTNC, boxes, logits, moved)
