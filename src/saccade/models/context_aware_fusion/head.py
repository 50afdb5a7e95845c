"""The decoder: stages that look at the map inside each box, at the other proposals and at the scene.

Shape letters: B batch, N proposals, M context tokens, C channels, K classes, P cells on an axis of a region, S stages,
T entries of the time embedding, D channels of a dynamic filter.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.context_aware_fusion.context import ContextFusion
from saccade.ops.boxes import to_centres, to_corners
from saccade.ops.constants import numbers
from saccade.ops.deformable import roi_align

#: how boxes are told: centres in shares of a half, sizes in logarithms, these no larger than the last
DELTA_WEIGHTS, LARGEST = (2.0, 2.0, 1.0, 1.0), log(100000 / 16)
#: probability of each class at the start
PRIOR = 0.01


class Decoded(NamedTuple):
    """What a stage says of its proposals.

    Attributes:
        logits_BNK: of each class, for a sigmoid.
        boxes_BN4: by their corners, in the units of those that came in.
        proposals_BNC: what the next stage starts from.
    """

    logits_BNK: Tensor
    boxes_BN4: Tensor
    proposals_BNC: Tensor


def apply_deltas(boxes_BN4: Tensor, deltas_BN4: Tensor) -> Tensor:
    """Boxes moved by dx / 2 of their width and dy / 2 of their height, and scaled by exp(dw) and exp(dh).

    Args:
        boxes_BN4: by their corners.
        deltas_BN4: (dx, dy, dw, dh).
    """
    centre, size = to_centres(boxes_BN4).split(2, -1)
    deltas = deltas_BN4 / numbers(DELTA_WEIGHTS, deltas_BN4)
    moved = torch.cat([centre + deltas[..., :2] * size, deltas[..., 2:].clamp(max=LARGEST).exp() * size], -1)
    return to_corners(moved)


def time_sinusoids(times_B: Tensor, dim: int) -> Tensor:
    """sin, then cos, of t exp(-log(10000) i / (C / 2 - 1)), i < C / 2: (B, C)."""
    rate = torch.exp(torch.arange(dim // 2, device=times_B.device) * -(log(10000) / (dim // 2 - 1)))
    angle = times_B.float()[:, None] * rate
    return torch.cat([angle.sin(), angle.cos()], -1)


class DynamicInteraction(nn.Module):
    """Each proposal makes two linear maps, C -> D -> C, and reads the cells of its own region through them.

    Args:
        dim: C.
        inner: D.
        cells: of a region, P x P.
    """

    def __init__(self, dim: int, inner: int, cells: int) -> None:
        super().__init__()
        self.dim, self.inner = dim, inner
        self.filters = nn.Linear(dim, 2 * dim * inner)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(inner), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.out = nn.Linear(cells * dim, dim)

    def forward(self, proposals_BNC: Tensor, regions_BNPC: Tensor) -> Tensor:
        """Proposals, and the cells of their regions in rows: (B, N, C)."""
        first, second = self.filters(proposals_BNC).chunk(2, -1)
        y = F.relu(self.norm1(regions_BNPC @ first.unflatten(-1, (self.dim, self.inner))))
        y = F.relu(self.norm2(y @ second.unflatten(-1, (self.inner, self.dim))))
        return F.relu(self.norm3(self.out(y.flatten(2))))


class DecoderStage(nn.Module):
    """A stage: proposals meet each other, the scene (CAF), their regions, and the time; then classes and boxes.

    Args:
        num_classes: K.
        dim: C.
        hidden: inner width of the feed-forward layers.
        num_heads: of both attentions.
        dropout: of each branch and of attention weights.
        inner: D of the dynamic interaction.
        pooled: P.
        class_layers, box_layers: of the towers before classes and boxes.
        context: False has no CAF: DiffusionDet's own stage.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int = 256,
        hidden: int = 2048,
        num_heads: int = 8,
        *,
        dropout: float = 0.0,
        inner: int = 64,
        pooled: int = 7,
        class_layers: int = 1,
        box_layers: int = 3,
        context: bool = True,
    ) -> None:
        super().__init__()
        if min(num_classes, hidden, inner, pooled) < 1 or min(class_layers, box_layers) < 0:
            raise ValueError(
                "num_classes, hidden, inner and pooled must be positive and layers not negative, got "
                f"{num_classes}, {hidden}, {inner}, {pooled}, {class_layers} and {box_layers}"
            )
        self.dim, self.pooled = dim, pooled
        self.attention = SoftmaxAttention(dim, num_heads, rope=False, qkv_bias=True, proj_bias=True, attn_drop=dropout)
        self.context = ContextFusion(dim, num_heads, dropout=dropout) if context else None
        self.interaction = DynamicInteraction(dim, inner, pooled * pooled)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)
        self.time = nn.Linear(4 * dim, 2 * dim)
        self.class_tower, self.box_tower = _tower(dim, class_layers), _tower(dim, box_layers)
        self.classes, self.deltas = nn.Linear(dim, num_classes), nn.Linear(dim, 4)

    def forward(
        self,
        regions_BNCPP: Tensor,
        boxes_BN4: Tensor,
        time_BT: Tensor,
        context_BMC: Tensor | None = None,
        proposals_BNC: Tensor | None = None,
    ) -> Decoded:
        """
        Args:
            regions_BNCPP: the maps inside the boxes, P x P cells each (`saccade.ops.deformable.roi_align`).
            boxes_BN4: by their corners.
            time_BT: (B, 4 C), the embedding of the time.
            context_BMC: of the scene; None leaves CAF out.
            proposals_BNC: of the stage before; where None, the means of the regions.

        Raises:
            ValueError: if the shapes do not fit.
        """
        expected = (*boxes_BN4.shape[:2], self.dim, self.pooled, self.pooled)
        if tuple(regions_BNCPP.shape) != expected:
            raise ValueError(f"regions must be {expected} for these boxes, got {tuple(regions_BNCPP.shape)}")
        regions_BNPC = regions_BNCPP.flatten(3).mT
        x_BNC = regions_BNPC.mean(2) if proposals_BNC is None else proposals_BNC
        x_BNC = self.norm1(x_BNC + self.dropout(self.attention(x_BNC)))
        if context_BMC is not None:
            if self.context is None:
                raise ValueError("this stage was built with context=False and takes none")
            x_BNC = self.context(x_BNC, context_BMC)
        x_BNC = self.norm2(x_BNC + self.dropout(self.interaction(x_BNC, regions_BNPC)))
        x_BNC = self.norm3(x_BNC + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(x_BNC))))))
        scale, shift = self.time(F.silu(time_BT))[:, None].chunk(2, -1)
        y_BNC = x_BNC * (scale + 1) + shift
        deltas_BN4 = self.deltas(self.box_tower(y_BNC))
        return Decoded(self.classes(self.class_tower(y_BNC)), apply_deltas(boxes_BN4, deltas_BN4), x_BNC)


class DiffusionHead(nn.Module):
    """DiffusionDet's decoder with context: noisy boxes and their time -> classes and better boxes, stage by stage.

    Args:
        num_classes: K.
        dim: C.
        stages: S.
        strides: of the maps, each twice the one before.
        pooled: P.
        detach: boxes carry no gradient from a stage to the next, as the authors'.
        **arguments: of `DecoderStage`.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int = 256,
        stages: int = 6,
        *,
        strides: Sequence[int] = (4, 8, 16, 32),
        pooled: int = 7,
        detach: bool = True,
        **arguments: int | float | bool,
    ) -> None:
        super().__init__()
        if stages < 1 or dim < 4 or dim % 2:
            raise ValueError(f"stages must be positive and dim even and at least 4, got {stages} and {dim}")
        self.dim, self.strides, self.pooled, self.detach = dim, tuple(strides), pooled, detach
        self.time = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))
        self.stages = nn.ModuleList(
            DecoderStage(num_classes, dim, pooled=pooled, **arguments)  # type: ignore[arg-type]
            for _ in range(stages)
        )
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
            elif name.endswith("classes.bias"):
                nn.init.constant_(parameter, -log((1 - PRIOR) / PRIOR))

    def forward(
        self, maps: Sequence[Tensor], boxes_BN4: Tensor, times_B: Tensor, context_BMC: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (S, B, N, K) and boxes (S, B, N, 4) of each stage, the last one last.

        Args:
            maps: (B, C, H, W), from fine to coarse, of `strides`.
            boxes_BN4: by their corners, in pixels of the image.
            times_B: of the diffusion.
            context_BMC: of the scene, or None.

        Raises:
            ValueError: if the shapes do not fit.
        """
        sinusoids = time_sinusoids(times_B, self.dim)
        time_BT = self.time(sinusoids.to(maps[0].dtype))
        said: list[Decoded] = []
        proposals_BNC = None
        for stage in self.stages:
            regions = roi_align(maps, boxes_BN4, self.strides, self.pooled)
            said.append(stage(regions, boxes_BN4, time_BT, context_BMC, proposals_BNC))
            _, boxes_BN4, proposals_BNC = said[-1]
            boxes_BN4 = boxes_BN4.detach() if self.detach else boxes_BN4
        return torch.stack([one.logits_BNK for one in said]), torch.stack([one.boxes_BN4 for one in said])


def _tower(dim: int, layers: int) -> nn.Sequential:
    return nn.Sequential(
        *(step for _ in range(layers) for step in (nn.Linear(dim, dim, bias=False), nn.LayerNorm(dim), nn.ReLU()))
    )
