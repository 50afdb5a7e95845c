"""The decoder: which cells become queries, and the layers that move their boxes.

Shape letters: B batch, N queries, S cells of all levels, C channels, H height, W width, K classes, D queries of
denoising, T = D + N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_act
from saccade.layers.deformable_attention import MSDeformableAttention
from saccade.layers.mlp import MLP
from saccade.layers.placed_attention import PlacedAttention
from saccade.models.rt_detrv2.denoising import Noised, Target, contrastive_queries
from saccade.ops.autocast import working_dtype
from saccade.ops.boxes import inverse_sigmoid
from saccade.ops.deformable.points import Size

SELECTION = ("default", "one2many", "agnostic")
#: the probability that scores start at
PRIOR = 0.01


def anchors(
    shapes: Sequence[Size], eps: float = 1e-2, size: float = 0.05, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """A box on the middle of each cell, as logits (S, 4) of (cx, cy, w, h), and which of them count (S, 1).

    Args:
        shapes: (height, width) of each level.
        eps: boxes any of whose numbers is not between it and 1 - eps do not count; their logits are +inf.
        size: width and height on the first level; twice those of the last on each further one.
        device: of the results.
    """
    boxes = []
    for level, (height, width) in enumerate(shapes):
        y, x = ((torch.arange(n, device=device) + 0.5) / n for n in (height, width))
        middle = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1).flatten(0, 1)
        boxes.append(torch.cat([middle, torch.full_like(middle, size * 2.0**level)], 1))
    box_S4 = torch.cat(boxes)
    valid_S1 = ((box_S4 > eps) & (box_S4 < 1 - eps)).all(1, keepdim=True)
    logit_S4 = (box_S4 / (1 - box_S4)).log()
    return logit_S4.masked_fill(~valid_S1, torch.inf), valid_S1


class DecoderLayer(nn.Module):
    """Attention among queries, deformable attention to the maps, an MLP, each added and then normalised.

    Args:
        dim: C.
        num_heads: of both attentions.
        hidden: of the MLP.
        num_levels, num_points, sampling, offset_scale: of `MSDeformableAttention`.
        drop: dropout in the MLP.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden: int,
        num_levels: int,
        num_points: int | Sequence[int],
        *,
        sampling: str = "bilinear",
        offset_scale: float = 0.5,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attention = PlacedAttention(dim, num_heads)
        self.cross_attention = MSDeformableAttention(
            dim, num_heads, num_levels, num_points, sampling=sampling, offset_scale=offset_scale
        )
        self.mlp = MLP(dim, hidden, activation="relu", drop=drop)
        for layer in (self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(
        self,
        x_BTC: Tensor,
        box_BT4: Tensor,
        place_BTC: Tensor,
        memory_BSC: Tensor,
        shapes: Sequence[Size],
        mask_TT: Tensor | None = None,
    ) -> Tensor:
        """(B, T, C); `mask_TT` is True where a query may attend to a query."""
        mask = None if mask_TT is None else mask_TT[None, None]
        x_BTC = self.norm1(x_BTC + self.self_attention(x_BTC, place_BTC, mask=mask))
        seen_BTC = self.cross_attention(x_BTC + place_BTC, box_BT4[:, :, None], memory_BSC, shapes)
        x_BTC = self.norm2(x_BTC + seen_BTC)
        return self.norm3(x_BTC + self.mlp(x_BTC))


@dataclass
class Queries:
    """What the decoder starts from.

    Attributes:
        content_BTC: features.
        box_BT4: boxes as logits.
        logits_BNK, boxes_BN4: what the cells themselves say, for their own loss.
    """

    content_BTC: Tensor
    box_BT4: Tensor
    logits_BNK: Tensor
    boxes_BN4: Tensor


@dataclass
class Decoded:
    """What the decoder's layers say of their queries.

    Attributes:
        logits: (B, T, K), of each layer; of the last that runs alone in evaluation.
        boxes: (B, T, 4) as (cx, cy, w, h) in [0, 1], of the same.
        queries: what it started from.
        noised: the queries of denoising that stand in front of the others; None where there are none.
    """

    logits: list[Tensor]
    boxes: list[Tensor]
    queries: Queries
    noised: Noised | None = None


class Decoder(nn.Module):
    """RT-DETRv2's decoder: maps -> N queries with a class and a box each.

    Gradients stop at the selected queries and between the layers' boxes in training only: in evaluation they are those
    of the function that is computed, for whoever explains it.

    Args:
        num_classes: K.
        in_channels: of the maps.
        dim: C.
        num_queries: N, or as many as there are cells where these are fewer.
        num_levels: of maps that are looked at; those beyond the maps given are made by convolutions of stride 2.
        num_points: on each level, see `MSDeformableAttention`.
        num_heads, hidden: of the layers and their MLPs.
        layers: how many.
        eval_layer: the last that runs in evaluation, from 0; -1 is the last there is.
        sampling, offset_scale: of `MSDeformableAttention`.
        selection: cells become queries by their largest class logit ("default"); by each class logit, so that a cell
            may be several ("one2many"); by the one logit that they have ("agnostic").
        learned_content: queries start from learned features, not from those of their cells.
        num_denoising: queries of denoising in training, about; 0 has none.
        label_noise, box_noise: see `contrastive_queries`.
        eps: margin of the anchors, see `anchors`.
        drop: dropout in the MLPs.

    Raises:
        ValueError: if a number is out of range, or there is no such selection.
    """

    def __init__(
        self,
        num_classes: int = 80,
        in_channels: Sequence[int] = (512, 1024, 2048),
        dim: int = 256,
        *,
        num_queries: int = 300,
        num_levels: int = 3,
        num_points: int | Sequence[int] = 4,
        num_heads: int = 8,
        hidden: int = 1024,
        layers: int = 6,
        eval_layer: int = -1,
        sampling: str = "bilinear",
        offset_scale: float = 0.5,
        selection: str = "default",
        learned_content: bool = False,
        num_denoising: int = 100,
        label_noise: float = 0.5,
        box_noise: float = 1.0,
        eps: float = 1e-2,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        if min(num_classes, num_queries, layers, len(in_channels)) < 1 or num_levels < len(in_channels):
            raise ValueError(
                "num_classes, num_queries, layers and in_channels must be positive and num_levels no fewer than the "
                f"maps, got {num_classes}, {num_queries}, {layers}, {list(in_channels)} and {num_levels}"
            )
        if not -layers <= eval_layer < layers:
            raise ValueError(f"eval_layer must be one of {layers} layers, got {eval_layer}")
        if selection not in SELECTION:
            raise ValueError(f"selection must be one of {', '.join(SELECTION)}, got {selection!r}")
        self.in_channels, self.num_classes, self.num_queries = tuple(in_channels), num_classes, num_queries
        self.eval_layer, self.selection, self.eps = eval_layer % layers, selection, eps
        self.num_denoising, self.label_noise, self.box_noise = num_denoising, label_noise, box_noise
        self.project = nn.ModuleList()
        for level in range(num_levels):
            further = level >= len(in_channels)
            channels = dim if level > len(in_channels) else in_channels[min(level, len(in_channels) - 1)]
            self.project.append(conv_norm_act(channels, dim, *((3, 2) if further else (1, 1)), activation=None))
        self.enc_output = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.enc_score = nn.Linear(dim, 1 if selection == "agnostic" else num_classes)
        self.enc_box = _box_head(dim)
        self.content = nn.Embedding(num_queries, dim) if learned_content else None
        self.denoising = nn.Embedding(num_classes + 1, dim, padding_idx=num_classes) if num_denoising else None
        self.place = nn.Sequential(nn.Linear(4, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim))
        self.layers = nn.ModuleList(
            DecoderLayer(
                dim, num_heads, hidden, num_levels, num_points, sampling=sampling, offset_scale=offset_scale, drop=drop
            )
            for _ in range(layers)
        )
        self.scores = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(layers))
        self.boxes = nn.ModuleList(_box_head(dim) for _ in range(layers))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scores start at the prior, boxes at their anchors."""
        for score in (self.enc_score, *self.scores):
            nn.init.constant_(score.bias, -math.log((1 - PRIOR) / PRIOR))
        for box in (self.enc_box, *self.boxes):
            nn.init.zeros_(box[-1].weight)
            nn.init.zeros_(box[-1].bias)
        projections: list[Any] = list(self.project)
        wide = [self.enc_output[0], self.place[0], self.place[2], *(level[0] for level in projections)]
        wide += [] if self.content is None else [self.content]
        for layer in wide:
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, maps: Sequence[Tensor], targets: Sequence[Target] | None = None) -> Decoded:
        """
        Args:
            maps: from fine to coarse, of `in_channels`.
            targets: of each image, for the queries of denoising in training.

        Raises:
            ValueError: if there are not as many maps, or one has other channels.
        """
        memory_BSC, shapes = self.flatten(maps)
        queries = self.select(memory_BSC, shapes)
        noised = mask_TT = None
        if self.training and targets and self.denoising is not None:
            noised = contrastive_queries(
                targets, self.num_classes, self.num_denoising, self.label_noise, self.box_noise
            )
        if noised is not None and self.denoising is not None:
            content = self.denoising(noised.labels_BD).to(queries.content_BTC.dtype)
            queries.content_BTC = torch.cat([content, queries.content_BTC], 1)
            queries.box_BT4 = torch.cat([inverse_sigmoid(noised.boxes_BD4), queries.box_BT4], 1)
            mask_TT = noised.mask(queries.logits_BNK.shape[1])
        return self.refine(queries, memory_BSC, shapes, mask_TT, noised)

    def flatten(self, maps: Sequence[Tensor]) -> tuple[Tensor, list[Size]]:
        """The maps at C channels, and further ones, cell by cell (B, S, C); (height, width) of each."""
        found = [x_BCHW.shape[1] for x_BCHW in maps]
        if found != list(self.in_channels):
            raise ValueError(f"maps must have {list(self.in_channels)} channels, got {found}")
        levels: list[Tensor] = []
        for level, project in enumerate(self.project):
            source = maps[level] if level < len(maps) else maps[-1] if level == len(maps) else levels[-1]
            levels.append(project(source))
        shapes = [(level.shape[2], level.shape[3]) for level in levels]
        return torch.cat([level.flatten(2) for level in levels], 2).transpose(1, 2), shapes

    def select(self, memory_BSC: Tensor, shapes: Sequence[Size]) -> Queries:
        """The cells that become queries."""
        anchor_S4, valid_S1 = anchors(shapes, self.eps, device=memory_BSC.device)
        features_BSC = self.enc_output(memory_BSC * valid_S1.to(memory_BSC.dtype))
        logits_BSK = self.enc_score(features_BSC)
        cells = logits_BSK.shape[1]
        if self.selection == "one2many":
            flat = logits_BSK.flatten(1)
            chosen_BN = flat.topk(min(self.num_queries, flat.shape[1])).indices // logits_BSK.shape[2]
        else:
            chosen_BN = logits_BSK.amax(-1).topk(min(self.num_queries, cells)).indices
        content_BNC = _rows(features_BSC, chosen_BN)
        # sums of logits in single precision at least, so that boxes are not rounded to pixels
        box_BN4 = self.enc_box(content_BNC).to(working_dtype(content_BNC.dtype)) + anchor_S4[chosen_BN]
        queries = Queries(
            self._stopped(content_BNC), self._stopped(box_BN4), _rows(logits_BSK, chosen_BN), box_BN4.sigmoid()
        )
        if self.content is not None:
            learned_NC = self.content.weight[: chosen_BN.shape[1]].to(content_BNC.dtype)
            queries.content_BTC = learned_NC.expand(len(content_BNC), -1, -1)
        return queries

    def refine(
        self,
        queries: Queries,
        memory_BSC: Tensor,
        shapes: Sequence[Size],
        mask_TT: Tensor | None = None,
        noised: Noised | None = None,
    ) -> Decoded:
        """The layers on queries (of any number and order), each of which moves the boxes of the last."""
        x_BTC, ref_BT4 = queries.content_BTC, queries.box_BT4.sigmoid()
        before_BT4 = ref_BT4
        out = Decoded([], [], queries, noised)
        for i, (layer, score, head) in enumerate(zip(self.layers, self.scores, self.boxes)):
            place_BTC = self.place(ref_BT4.to(x_BTC.dtype))
            x_BTC = layer(x_BTC, ref_BT4, place_BTC, memory_BSC, shapes, mask_TT)
            move_BT4 = head(x_BTC).to(ref_BT4.dtype)
            box_BT4 = (move_BT4 + inverse_sigmoid(ref_BT4)).sigmoid()
            if self.training or i == self.eval_layer:
                out.logits.append(score(x_BTC))
                # in training the box before learns from this one too: looking forward twice
                seen = box_BT4 if i == 0 or not self.training else (move_BT4 + inverse_sigmoid(before_BT4)).sigmoid()
                out.boxes.append(seen)
            if not self.training and i == self.eval_layer:
                break
            before_BT4, ref_BT4 = box_BT4, self._stopped(box_BT4)
        return out

    def _stopped(self, x: Tensor) -> Tensor:
        return x.detach() if self.training else x


def _box_head(dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, 4))


def _rows(x_BSC: Tensor, index_BN: Tensor) -> Tensor:
    return x_BSC.gather(1, index_BN[..., None].expand(-1, -1, x_BSC.shape[2]))
