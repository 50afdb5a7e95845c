"""Coarse and fine tokens of a cloud of points: means of features over neighbourhoods of well spread centres.

Shape letters: B batch, P points, C features, V centres, G points of a neighbourhood, n fine tokens of a centre.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def farthest_points(points_BP3: Tensor, count: int) -> Tensor:
    """Indices (B, count) of points that lie far from each other: the first point, then ever the farthest from all.

    Args:
        points_BP3: places; of any number of axes.
        count: at most P.

    Raises:
        ValueError: if there are fewer points.
    """
    batch, most = points_BP3.shape[:2]
    if not 1 <= count <= most:
        raise ValueError(f"count must be between 1 and the number of points ({most}), got {count}")
    chosen = torch.zeros(batch, count, dtype=torch.long, device=points_BP3.device)
    near_BP = torch.full((batch, most), torch.inf, device=points_BP3.device, dtype=points_BP3.dtype)
    for i in range(1, count):
        last_B13 = points_BP3.take_along_dim(chosen[:, i - 1, None, None], 1)
        near_BP = torch.minimum(near_BP, (points_BP3 - last_B13).square().sum(-1))
        chosen[:, i] = near_BP.argmax(1)
    return chosen


def neighbours(points_BP3: Tensor, centres_BV3: Tensor, count: int) -> Tensor:
    """Indices (B, V, count) of the points that are nearest to each centre, the nearest first.

    Args:
        points_BP3: places.
        centres_BV3: of the neighbourhoods.
        count: at most P.

    Raises:
        ValueError: if there are fewer points.
    """
    if not 1 <= count <= points_BP3.shape[1]:
        raise ValueError(f"a neighbourhood must be between 1 and {points_BP3.shape[1]} points, got {count}")
    return torch.cdist(centres_BV3, points_BP3).topk(count, largest=False).indices


def scene_tokens(
    points_BP3: Tensor,
    features_BPC: Tensor,
    *,
    tokens: int = 128,
    group: int = 384,
    per_token: int = 4,
    fine_group: int = 1500,
    dense: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Coarse features (B, V, C), fine ones (B, V, n, C), and the centres (B, V, 3).

    A coarse token is the mean over `group` points around a centre. Of the `fine_group` points of the dense cloud around
    that centre, n lie far from each other, and each gives the mean of the fine_group / n points nearest to it.

    Args:
        points_BP3, features_BPC: of the cloud that is sampled (40,000 points there).
        tokens, group: V and the points of a coarse token.
        per_token, fine_group: n and the points under a coarse token.
        dense: points and features of the dense cloud; the same cloud where None.

    Raises:
        ValueError: if points and features do not fit together, or are fewer than asked for.
    """
    if points_BP3.shape[:2] != features_BPC.shape[:2]:
        raise ValueError(
            f"points and features must be as many, got {tuple(points_BP3.shape)} and {tuple(features_BPC.shape)}"
        )
    if fine_group // per_token < 1:
        raise ValueError(f"fine_group must be at least per_token ({per_token}), got {fine_group}")
    centres_BV3 = points_BP3.take_along_dim(farthest_points(points_BP3, tokens)[..., None], 1)
    coarse_BVC = _means(features_BPC, neighbours(points_BP3, centres_BV3, group))
    wide_BP3, wide_BPC = (points_BP3, features_BPC) if dense is None else dense
    patch_BVG = neighbours(wide_BP3, centres_BV3, fine_group)
    patch_BVG3 = _gathered(wide_BP3, patch_BVG).flatten(0, 1)
    patch_BVGC = _gathered(wide_BPC, patch_BVG).flatten(0, 1)
    inner = patch_BVG3.take_along_dim(farthest_points(patch_BVG3, per_token)[..., None], 1)
    fine = _means(patch_BVGC, neighbours(patch_BVG3, inner, fine_group // per_token))
    return coarse_BVC, fine.unflatten(0, coarse_BVC.shape[:2]), centres_BV3


def _gathered(x_BPC: Tensor, index_BVG: Tensor) -> Tensor:
    return x_BPC.take_along_dim(index_BVG.flatten(1)[..., None], 1).unflatten(1, index_BVG.shape[1:])


def _means(x_BPC: Tensor, index_BVG: Tensor) -> Tensor:
    return _gathered(x_BPC, index_BVG).mean(2)


class SceneProjector(nn.Sequential):
    """Features of coarse and of fine tokens to a language model's width: three linear layers, ReLU between them.

    Args:
        channels: of the features, 768 of OpenScene.
        dim: of the language model.
    """

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__(nn.Linear(channels, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))


class PromptTokens(nn.Module):
    """Boxes or clicks (B, C), as features, to tokens (B, count, D) of the language model.

    Args:
        channels: of a box's features or a click's waves, 768.
        dim: D.
        count: of tokens.
    """

    def __init__(self, channels: int, dim: int, count: int = 8) -> None:
        super().__init__()
        self.count, self.fc1, self.fc2 = count, nn.Linear(channels, dim), nn.Linear(dim, count * dim)

    def forward(self, x_BC: Tensor) -> Tensor:
        return self.fc2(self.fc1(x_BC).relu()).unflatten(-1, (self.count, -1))
