"""What trains the detector: boxes are given to voxels, and rays are held to photographs.

Shape letters: B scenes, N places, G boxes of a scene, K classes, R rays, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.boxes3d import SceneDetection
from saccade.ops.boxes import area

#: a box belongs to the coarsest level where it holds so many places, and to so many of them at most
LEAST_PLACES, MOST_PLACES = 27, 18
_ALPHA, _GAMMA = 0.25, 2.0


def assign(
    places_N3: Tensor, levels: Sequence[int], boxes_G6: Tensor, labels_G: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Class (N,), -1 for none, box (N, 6) and centreness (N,) of each place.

    A box belongs to the coarsest level at which it holds 27 places (to the finest where none does), there to the 18
    inside it with the largest centreness; a place of several boxes to the smallest.

    Args:
        places_N3: of all levels.
        levels: how many of the places belong to each.
        boxes_G6: lower and upper corners.
        labels_G: classes.
    """
    N, G = len(places_N3), len(boxes_G6)
    if not G:
        return labels_G.new_full((N,), -1), places_N3.new_zeros(N, 6), places_N3.new_zeros(N)
    low_NG3, high_NG3 = places_N3[:, None] - boxes_G6[:, :3], boxes_G6[:, 3:] - places_N3[:, None]
    inside_NG = (torch.minimum(low_NG3, high_NG3) > 0).all(-1)
    level_N = torch.repeat_interleave(
        torch.arange(len(levels), device=places_N3.device), torch.tensor(levels, device=places_N3.device)
    )
    count_LG = torch.stack([inside_NG[level_N == level].sum(0) for level in range(len(levels))])
    enough_LG = count_LG >= LEAST_PLACES
    coarsest_G = torch.where(enough_LG, torch.arange(len(levels), device=places_N3.device)[:, None], 0).amax(0)
    inside_NG = inside_NG & (level_N[:, None] == coarsest_G)
    ends = torch.minimum(low_NG3, high_NG3).clamp(min=0), torch.maximum(low_NG3, high_NG3).clamp(min=1e-9)
    centre_NG = torch.where(inside_NG, (ends[0] / ends[1]).prod(-1).sqrt(), -1.0)
    kept = centre_NG.topk(min(MOST_PLACES, N), 0)
    chosen_NG = torch.zeros_like(inside_NG).scatter_(0, kept.indices, True) & inside_NG
    volume_NG = torch.where(chosen_NG, area(boxes_G6), torch.inf)
    smallest = volume_NG.argmin(1)
    has = chosen_NG.any(1)
    label_N = torch.where(has, labels_G[smallest], -1)
    return label_N, boxes_G6[smallest], centre_NG.gather(1, smallest[:, None])[:, 0].clamp(min=0)


def detection_loss(
    found: SceneDetection,
    boxes: Sequence[Tensor],
    labels: Sequence[Tensor],
    ray_colours: Tensor | None = None,
    ray_depths: Tensor | None = None,
) -> dict[str, Tensor]:
    """Terms, whose sum is what training makes small: focal loss of the classes, IoU of the boxes, centreness, colours
    and depths of rays.

    Args:
        found: what the network says.
        boxes, labels: of each scene, (G, 6) and (G,).
        ray_colours: (B, R, 3), the photographs'; None without rays.
        ray_depths: (B, R), measured, 0 where nothing was; None leaves the term out.

    Raises:
        ValueError: if these are not of as many scenes.
    """
    if not len(boxes) == len(labels) == len(found.logits):
        raise ValueError(f"boxes and labels must be of {len(found.logits)} scenes, got {len(boxes)} and {len(labels)}")
    terms: dict[str, list[Tensor]] = {"classes": [], "boxes": [], "centreness": []}
    for b, (box_G6, label_G) in enumerate(zip(boxes, labels)):
        label_N, box_N6, centre_N = assign(found.places[b], found.levels, box_G6.to(found.places), label_G)
        positive = label_N >= 0
        count = positive.sum().clamp(min=1)
        truth_NK = F.one_hot(label_N.clamp(min=0), found.logits.shape[2]) * positive[:, None]
        held = found.seen[b]
        terms["classes"].append((focal(found.logits[b], truth_NK.to(found.logits)) * held[:, None]).sum() / count)
        weight = centre_N * positive
        overlap = _overlap(found.pred_boxes[b], box_N6)
        terms["boxes"].append(((1 - overlap) * weight).sum() / weight.sum().clamp(min=1e-6))
        said = F.binary_cross_entropy_with_logits(found.centreness[b], centre_N.to(found.centreness), reduction="none")
        terms["centreness"].append((said * positive).sum() / count)
    losses: Mapping[str, Tensor] = {name: torch.stack(each).mean() for name, each in terms.items()}
    found_losses = dict(losses)
    if ray_colours is not None and found.colour is not None and found.counted is not None:
        counted = found.counted.to(found.colour.dtype)
        total = counted.sum().clamp(min=1)
        square = (found.colour - ray_colours).square().mean(-1)
        found_losses["colours"] = (square * counted).sum() / total
        if ray_depths is not None and found.depth is not None:
            counted = counted * (ray_depths > 0)
            found_losses["depths"] = ((found.depth - ray_depths).abs() * counted).sum() / counted.sum().clamp(min=1)
    return found_losses


def focal(logits: Tensor, truth: Tensor) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t of each class by itself, gamma 2, alpha 0.25 (arXiv 1708.02002).

    Args:
        logits: of any shape.
        truth: 1 or 0.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    p = logits.sigmoid()
    wrong = p * (1 - truth) + (1 - p) * truth
    return (_ALPHA * truth + (1 - _ALPHA) * (1 - truth)) * wrong**_GAMMA * entropy


def _overlap(a_N6: Tensor, b_N6: Tensor) -> Tensor:
    """IoU of the boxes of each row."""
    common = (torch.minimum(a_N6[:, 3:], b_N6[:, 3:]) - torch.maximum(a_N6[:, :3], b_N6[:, :3])).clamp(min=0).prod(-1)
    return common / (area(a_N6) + area(b_N6) - common).clamp(min=1e-9)
