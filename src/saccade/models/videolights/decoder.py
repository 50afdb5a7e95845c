"""The decoder: anchors in time that each layer moves, as DAB-DETR's in one dimension.

Shape letters: B batch, Q queries, L clips, D width, H heads, E width of a head, N queries or
clips, i layers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from saccade.layers.positions import sinusoids
from saccade.ops.attend import attend
from saccade.ops.boxes import inverse_sigmoid
from saccade.ops.heads import check_heads
from saccade.ops.masks import padding

#: what the logit of a coordinate keeps from 0 and 1
EPS = 1e-3


def mlp(*widths: int) -> nn.Sequential:
    """Linear maps, and ReLUs between."""
    layers = [layer for n, m in zip(widths, widths[1:]) for layer in (nn.Linear(n, m), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def place_code(spans_BQ2: Tensor, dim: int) -> Tensor:
    """Sinusoids of middle and width, in [0, 1], each of dim / 2 numbers: (B, Q, dim)."""
    code = sinusoids((2 * math.pi * spans_BQ2).flatten(), dim // 2)
    return code.unflatten(0, spans_BQ2.shape).flatten(2)


class DecoderLayer(nn.Module):
    """Attention among queries, attention to clips by content and place, a feed-forward layer, each post-norm.

    Args:
        dim: D.
        num_heads: of both attentions.
        feedforward: inner width.
        drop: of attention weights and branches.
        first: whether queries and clips have their positions added to the content too.

    Raises:
        ValueError: if heads do not divide the width.
    """

    def __init__(
        self, dim: int = 256, num_heads: int = 8, feedforward: int = 1024, drop: float = 0.1, *, first: bool = False
    ) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.rate = num_heads, drop
        names = ["sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"]
        names += ["ca_qcontent", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine", *(["ca_qpos"] if first else [])]
        self.maps = nn.ModuleDict({name: nn.Linear(dim, dim) for name in names})
        self.self_out, self.cross_out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.linear1, self.linear2 = nn.Linear(dim, feedforward), nn.Linear(feedforward, dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.activation, self.drop = nn.PReLU(), nn.Dropout(drop)

    def forward(
        self,
        x_BQD: Tensor,
        place_BQD: Tensor,
        sine_BQD: Tensor,
        memory_BLD: Tensor,
        clip_place_BLD: Tensor,
        clips_BL: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            x_BQD: content of the queries.
            place_BQD, sine_BQD: their anchors, embedded, and as sinusoids that are weighed.
            memory_BLD, clip_place_BLD: clips and their positions.
            clips_BL: bool, False is padding.
        """
        maps, rate = self.maps, self.rate if self.training else 0.0
        query = maps["sa_qcontent"](x_BQD) + maps["sa_qpos"](place_BQD)
        key = maps["sa_kcontent"](x_BQD) + maps["sa_kpos"](place_BQD)
        out = attend(*map(self._heads, (query, key, maps["sa_v"](x_BQD))), dropout=rate)
        x_BQD = self.norm1(x_BQD + self.drop(self.self_out(out.transpose(1, 2).flatten(2))))

        query, key, where = maps["ca_qcontent"](x_BQD), maps["ca_kcontent"](memory_BLD), maps["ca_kpos"](clip_place_BLD)
        if "ca_qpos" in maps:
            query, key = query + maps["ca_qpos"](place_BQD), key + where
        q_BHQE = torch.cat([self._heads(query), self._heads(maps["ca_qpos_sine"](sine_BQD))], -1)
        k_BHLE = torch.cat([self._heads(key), self._heads(where)], -1)
        mask = None if clips_BL is None else padding(clips_BL)
        out = attend(q_BHQE, k_BHLE, self._heads(maps["ca_v"](memory_BLD)), mask=mask, dropout=rate)
        x_BQD = self.norm2(x_BQD + self.drop(self.cross_out(out.transpose(1, 2).flatten(2))))
        return self.norm3(x_BQD + self.drop(self.linear2(self.drop(self.activation(self.linear1(x_BQD))))))

    def _heads(self, x_BND: Tensor) -> Tensor:
        return x_BND.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class SpanDecoder(nn.Module):
    """Layers over learned anchors (middle, width).

    Args:
        dim, num_heads, feedforward, drop: of `DecoderLayer`.
        layers: how many.
        num_queries: Q.

    Raises:
        ValueError: if there is no layer or query, or the width is not a multiple of 4.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        feedforward: int = 1024,
        drop: float = 0.1,
        *,
        layers: int = 3,
        num_queries: int = 10,
    ) -> None:
        super().__init__()
        if min(layers, num_queries) < 1 or dim % 4:
            raise ValueError(
                f"layers and num_queries must be positive and dim a multiple of 4, got {layers}, {num_queries}, {dim}"
            )
        self.anchors = nn.Parameter(torch.randn(num_queries, 2))
        self.layers = nn.ModuleList(
            DecoderLayer(dim, num_heads, feedforward, drop, first=i == 0) for i in range(layers)
        )
        self.place = mlp(dim, dim, dim)
        self.width = mlp(dim, dim, 1)
        # what the last layer would move its anchors by, nobody reads: a single layer has neither
        self.scale = mlp(dim, dim, dim) if layers > 1 else None
        self.move = mlp(dim, dim, dim, 2) if layers > 1 else None
        self.norm = nn.LayerNorm(dim)
        if self.move is not None:
            last = self.move[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(
        self, memory_BLD: Tensor, clip_place_BLD: Tensor, clips_BL: Tensor | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Of each layer its content (B, Q, D), normalised, and the anchors (B, Q, 2) that it started from.

        Args:
            memory_BLD, clip_place_BLD: clips and their positions.
            clips_BL: bool, False is padding.
        """
        B, _, D = memory_BLD.shape
        span_BQ2 = self.anchors.sigmoid().expand(B, -1, -1)
        x_BQD = torch.zeros(B, self.anchors.shape[0], D, dtype=memory_BLD.dtype, device=memory_BLD.device)
        contents: list[Tensor] = []
        anchors: list[Tensor] = []
        for layer in self.layers:
            anchors.append(span_BQ2)
            seen_BQ2 = span_BQ2.detach() if self.training and contents else span_BQ2
            sine_BQD = place_code(seen_BQ2, D).to(x_BQD.dtype)
            place_BQD = self.place(sine_BQD)
            if contents and self.scale is not None:
                sine_BQD = sine_BQD * self.scale(x_BQD)
            sine_BQD = sine_BQD * (self.width(x_BQD).sigmoid() / seen_BQ2[..., 1:])
            x_BQD = layer(x_BQD, place_BQD, sine_BQD, memory_BLD, clip_place_BLD, clips_BL)
            contents.append(self.norm(x_BQD))
            if self.move is not None and len(contents) < len(self.layers):
                span_BQ2 = (self.move(x_BQD) + inverse_sigmoid(seen_BQ2, EPS)).sigmoid()
        return contents, anchors
