"""Finding parts: prototypes that patches are near to, and which patches are foreground.

Shape letters: B batch, D width, K parts and one background after them (K + 1 in all: T), H height, W width of the map,
Y classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODULATIONS = ("layer-norm", "weight", "mlp", "none")


class Foreground(NamedTuple):
    """What is foreground (first channel) and background.

    Attributes:
        hard: (B, 2, H, W), 0 or 1, with the gradient of the soft parts.
        soft: (B, 2, H, W), of the largest part and of the background.
    """

    hard: Tensor
    soft: Tensor


def foreground(maps_BTHW: Tensor, drop: float = 0.0) -> Foreground:
    """Where the largest of the parts is at least the background; in the gradient, their sum stands for both channels.

    Args:
        maps_BTHW: parts, then the background.
        drop: probability that a part of an image is left out.
    """
    parts_BKHW, back_B1HW = maps_BTHW[:, :-1], maps_BTHW[:, -1:]
    if drop > 0:
        parts_BKHW = F.dropout2d(parts_BKHW, drop) * (1 - drop)  # what stays keeps its value
    soft = torch.cat([parts_BKHW.amax(1, keepdim=True), back_B1HW], 1)
    is_front = soft[:, :1] >= back_B1HW
    hard, sums = torch.cat([is_front, ~is_front], 1).to(maps_BTHW), parts_BKHW.sum(1, keepdim=True)
    return Foreground(hard + (sums - sums.detach()), soft)


def without(maps_BTHW: Tensor, removed: Sequence[int]) -> Foreground:
    """The foreground without some parts: where one of them is the largest of all, there is background.

    Args:
        maps_BTHW: parts, then the background, without noise.
        removed: numbers of parts, from 0.
    """
    taken = maps_BTHW.new_zeros(maps_BTHW.shape[1], dtype=torch.bool)
    taken[list(removed)] = True
    was_BHW = taken[maps_BTHW.argmax(1)]
    left_BTHW = maps_BTHW.masked_fill(taken[:, None, None], -1.0)  # below, and 2 above, all shares
    back_BHW = left_BTHW[:, -1].masked_fill(was_BHW, 2.0)
    return foreground(torch.cat([left_BTHW[:, :-1], back_BHW[:, None]], 1))


class PartFinder(nn.Module):
    """Distances of patches to prototypes, parts' features, and what each part says of the class.

        logits = -|x - p_k|^2,   A = softmax over parts and background,   v_k = mean over patches of A_k x

    Args:
        dim: D.
        parts: K.
        num_classes: Y.
        modulation: of the features: a joint layer norm over (D, K + 1), a factor each ("weight"), a layer norm and a
            linear map with GELU of each part's own ("mlp"), or "none".
        temperature: of the softmax.
        drop: probability that a part says nothing of the class, in training.

    Raises:
        ValueError: if a number is not positive, or there is no such modulation.
    """

    def __init__(
        self,
        dim: int,
        parts: int,
        num_classes: int,
        *,
        modulation: str = "layer-norm",
        temperature: float = 1.0,
        drop: float = 0.3,
    ) -> None:
        super().__init__()
        if min(dim, parts, num_classes) < 1 or temperature <= 0:
            raise ValueError(
                f"parts, num_classes and temperature must be positive, got {parts}, {num_classes} and {temperature}"
            )
        if modulation not in MODULATIONS:
            raise ValueError(f"modulation must be one of {', '.join(MODULATIONS)}, got {modulation!r}")
        self.temperature = temperature
        self.prototypes = nn.Conv2d(dim, parts + 1, 1, bias=False)
        self.modulation: nn.Module | None = None
        if modulation == "layer-norm":
            self.modulation = nn.LayerNorm([dim, parts + 1])
        elif modulation == "weight":
            self.modulation = _Weight(dim, parts + 1)
        elif modulation == "mlp":
            self.modulation = _PartMLPs(dim, parts + 1)
        self.drop, self.head = nn.Dropout1d(drop), nn.Linear(dim, num_classes, bias=False)
        nn.init.trunc_normal_(self.head.weight, std=0.02)

    def dots(self, x_BDHW: Tensor) -> Tensor:
        """p_k . x, (B, K + 1, H, W)."""
        return self.prototypes(x_BDHW)

    def logits(self, x_BDHW: Tensor, dots_BTHW: Tensor) -> Tensor:
        """-|x - p_k|^2."""
        size_T = self.prototypes.weight.flatten(1).square().sum(1)
        return 2 * dots_BTHW - x_BDHW.square().sum(1, keepdim=True) - size_T[:, None, None]

    def maps(self, logits_BTHW: Tensor, noise: Tensor | None = None) -> Tensor:
        """softmax over parts of (logits + noise) / temperature."""
        return ((logits_BTHW if noise is None else logits_BTHW + noise) / self.temperature).softmax(1)

    def features(self, x_BDHW: Tensor, maps_BTHW: Tensor) -> Tensor:
        """v after the modulation, (B, D, K + 1)."""
        found = x_BDHW.flatten(2) @ maps_BTHW.flatten(2).mT / maps_BTHW[0, 0].numel()
        return found if self.modulation is None else self.modulation(found)

    def classify(self, features_BDT: Tensor) -> Tensor:
        """What each part says of each class, (B, Y, K)."""
        return self.head(self.drop(features_BDT[..., :-1].mT)).mT


class _Weight(nn.Module):
    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, parts))

    def forward(self, features_BDT: Tensor) -> Tensor:
        return self.weight * features_BDT


class _PartMLPs(nn.Module):
    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU()) for _ in range(parts)
        )

    def forward(self, features_BDT: Tensor) -> Tensor:
        parts = zip(self.layers, features_BDT.unbind(2), strict=True)
        return torch.stack([layer(part) for layer, part in parts], 2)
