"""Deformable attention that asks keys, and the update of positions by its scores.

Shape letters: B images, N queries, C channels, M heads of D, L levels, P points of a level, S samples of a head (L P),
A all samples of a query (M L P), R numbers of a reference, F pixels of all levels, K coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from saccade.ops.autocast import working_dtype
from saccade.ops.constants import numbers
from saccade.ops.deformable import level_pixels, samples
from saccade.ops.deformable.points import Size


def sine_embedding(x_NK: Tensor, dim: int = 128, temperature: float = 10.0) -> Tensor:
    """sin and cos in turn of 2 pi x / t^(2 i / dim), i < dim / 2, of each coordinate, (..., K dim); y comes before x.

    Args:
        x_NK: (x, y), or (x, y, w, h).
        dim: numbers for a coordinate, even.
        temperature: t.
    """
    swapped = torch.cat([x_NK[..., 1:2], x_NK[..., :1], x_NK[..., 2:]], -1)
    rate = temperature ** (2 * torch.arange(dim // 2, device=x_NK.device, dtype=x_NK.dtype) / dim)
    angle = swapped[..., None] * (2 * math.pi) / rate
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-3)


class Looked(NamedTuple):
    """What key-aware attention gives.

    Attributes:
        out: (B, N, C).
        logits: (B, N, M, S), before the softmax.
        offsets: (B, N, M, S, 2), (x, y) in cells of the sample's level.
    """

    out: Tensor
    logits: Tensor
    offsets: Tensor


class KeyAwareDeformableAttention(nn.Module):
    """y = Wo concat_m( sum_s softmax_s(q_m . K(r + o_ms) / sqrt(D)) V(r + o_ms) ),   o = Wd x, in cells of each level.

    Args:
        dim: C.
        num_heads: M.
        num_levels, num_points: L and P.
        by_box: a reference with a size scales the offsets, o / P times half of it; False leaves the size alone.

    Raises:
        ValueError: if heads do not divide the channels, or a number is not positive.
    """

    def __init__(
        self, dim: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4, *, by_box: bool = False
    ) -> None:
        super().__init__()
        if min(dim, num_heads, num_levels, num_points) < 1 or dim % num_heads:
            raise ValueError(
                "num_heads must divide dim and levels and points be positive, got "
                f"{num_heads}, {dim}, {num_levels} and {num_points}"
            )
        self.num_heads, self.num_levels, self.num_points, self.by_box = num_heads, num_levels, num_points, by_box
        self.sampling_offsets = nn.Linear(dim, 2 * num_heads * num_levels * num_points)
        self.value_proj, self.key_proj, self.query_proj, self.output_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Points go out from the reference, head by head in another direction."""
        for layer in (self.value_proj, self.key_proj, self.query_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        angle_M = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
        direction_M2 = torch.stack([angle_M.cos(), angle_M.sin()], -1)
        direction_M2 = direction_M2 / direction_M2.abs().amax(-1, keepdim=True)
        step_S = torch.arange(1, self.num_points + 1).repeat(self.num_levels)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction_M2[:, None] * step_S[:, None]).flatten())

    def forward(
        self, query_BNC: Tensor, reference_BNLR: Tensor, memory_BFC: Tensor, shapes: Sequence[Size],
        mask_BF: Tensor | None = None,
    ) -> Looked:  # fmt: skip
        """
        Args:
            query_BNC: what looks.
            reference_BNLR: where, on each level (or (B, N, 1, R) on all): (x, y) or (x, y, w, h), in [0, 1].
            memory_BFC: pixels of all levels, each row by row.
            shapes: (height, width) of each level.
            mask_BF: True = is looked at; keys and values of others are 0.

        Raises:
            ValueError: if levels and pixels do not fit.
        """
        if len(shapes) != self.num_levels or memory_BFC.shape[1] != sum(h * w for h, w in shapes):
            raise ValueError(
                f"shapes must be {self.num_levels} levels of {memory_BFC.shape[1]} pixels in all, got {list(shapes)}"
            )
        value_BFC, key_BFC = self.value_proj(memory_BFC), self.key_proj(memory_BFC)
        if mask_BF is not None:
            value_BFC, key_BFC = (x * mask_BF[..., None].to(x.dtype) for x in (value_BFC, key_BFC))
        heads = (self.num_heads, -1)
        offsets_BNMS2 = self.sampling_offsets(query_BNC).unflatten(-1, (*heads, 2))
        offsets_BNMS2 = offsets_BNMS2.to(working_dtype(offsets_BNMS2.dtype))
        reference_BNLR = reference_BNLR.expand(-1, -1, self.num_levels, -1).to(offsets_BNMS2.dtype)
        reference_BN1SR = reference_BNLR.repeat_interleave(self.num_points, 2)[:, :, None]
        if self.by_box and reference_BN1SR.shape[-1] == 4:
            moved = offsets_BNMS2 / self.num_points * reference_BN1SR[..., 2:] * 0.5
        else:
            moved = offsets_BNMS2 / level_sizes(shapes, self.num_points, offsets_BNMS2)
        read = samples(level_pixels(reference_BN1SR[..., :2] + moved, shapes), shapes)
        query_BNMD = self.query_proj(query_BNC).unflatten(-1, heads)
        logits_BNMS = read.dot(query_BNMD, key_BFC.unflatten(-1, heads)) * query_BNMD.shape[-1] ** -0.5
        out_BNMD = read.sum(value_BFC.unflatten(-1, heads), logits_BNMS.softmax(-1))
        return Looked(self.output_proj(out_BNMD.flatten(2)), logits_BNMS, offsets_BNMS2)


def level_sizes(shapes: Sequence[Size], num_points: int, like: Tensor, *, transposed: bool = False) -> Tensor:
    """(width, height) of the level of each sample, (S, 2); (height, width) where `transposed`."""
    return numbers([size if transposed else size[::-1] for size in shapes for _ in range(num_points)], like)


class PositionUpdate(nn.Module):
    """APU: the scores of a query's samples say how to average its offsets, D = sum_a softmax_a(M logits) o_a.

    Args:
        dim: C, the width of the MLP.
        num_samples: A.
    """

    def __init__(self, dim: int, num_samples: int) -> None:
        super().__init__()
        self.disentangle = nn.Sequential(
            nn.Linear(num_samples, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, num_samples)
        )

    def weights(self, logits_NA: Tensor) -> Tensor:
        """Of all samples of a query, (..., A).

        Args:
            logits_NA: of the attention, heads outermost.
        """
        return self.disentangle(logits_NA).softmax(-1)

    def forward(self, logits_NA: Tensor, moves_NA2: Tensor) -> Tensor:
        """(..., 2).

        Args:
            logits_NA: of the attention, heads outermost.
            moves_NA2: the offsets, as shares of the maps.
        """
        return (self.weights(logits_NA)[..., None].to(moves_NA2.dtype) * moves_NA2).sum(-2)
