"""Contrastive denoising: noised boxes and classes of the truth as queries of their own, in training.

Shape letters: B batch, D queries of denoising, G most objects of an image, N other queries, T = D + N.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.detection import Target
from saccade.ops.boxes import to_centres, to_corners


@dataclass
class Noised:
    """Groups of queries, each G that lie near the objects and then G that lie further off.

    Attributes:
        labels_BD: classes; the number of classes where an image has fewer objects than G.
        boxes_BD4: (cx, cy, w, h) in [0, 1].
        positive: of each image, the queries near an object, group by group in the order of the objects.
        groups: how many.
    """

    labels_BD: Tensor
    boxes_BD4: Tensor
    positive: list[Tensor]
    groups: int

    def mask(self, queries: int) -> Tensor:
        """Who may attend to whom, (T, T), True = may: a group sees itself and the N others, these only each other."""
        D = self.labels_BD.shape[1]
        own_D = torch.arange(D, device=self.labels_BD.device) // (D // self.groups)
        group_T = F.pad(own_D, (0, queries), value=-1)
        return (group_T[:, None] == group_T) | (group_T == -1)


def contrastive_queries(
    targets: Sequence[Target], num_classes: int, number: int = 100, label_noise: float = 0.5, box_noise: float = 1.0
) -> Noised | None:
    """Noised copies of the truth; None where no image has an object, or none is wanted.

    Corners move by u (w or h) / 2 `box_noise` in a random direction each, u of [0, 1) near the objects and of [1, 2)
    further off; what leaves the image is cut off.

    Args:
        targets: of each image.
        num_classes: K.
        number: max(1, number // G) groups are made; 0 makes none.
        label_noise: a class becomes a random one with half this probability.
        box_noise: how far corners move.
    """
    most = max((len(target["labels"]) for target in targets), default=0)
    if number < 1 or not most:
        return None
    groups, device = max(1, number // most), targets[0]["labels"].device
    padded = [most - len(target["labels"]) for target in targets]
    labels_BG = torch.stack([F.pad(t["labels"], (0, pad), value=num_classes) for t, pad in zip(targets, padded)])
    boxes_BG4 = torch.stack([F.pad(t["boxes"].float(), (0, 0, 0, pad)) for t, pad in zip(targets, padded)])
    labels_BD, boxes_BD4 = labels_BG.repeat(1, 2 * groups), boxes_BG4.repeat(1, 2 * groups, 1)
    real_BD = labels_BD < num_classes
    if label_noise > 0:
        flipped_BD = (torch.rand_like(boxes_BD4[..., 0]) < label_noise / 2) & real_BD
        labels_BD = torch.where(flipped_BD, torch.randint_like(labels_BD, num_classes), labels_BD)
    if box_noise > 0:
        reach_BD4 = boxes_BD4[..., 2:].repeat(1, 1, 2) / 2 * box_noise
        further_D = torch.arange(2 * groups, device=device).repeat_interleave(most) % 2
        direction = torch.randint_like(boxes_BD4, 2) * 2 - 1
        far = torch.rand_like(boxes_BD4) + further_D[:, None]
        boxes_BD4 = to_centres((to_corners(boxes_BD4) + direction * far * reach_BD4).clamp(0, 1))
    start_g = torch.arange(groups, device=device) * (2 * most)
    positive = [(start_g[:, None] + torch.arange(most - pad, device=device)).flatten() for pad in padded]
    return Noised(labels_BD, boxes_BD4, positive, groups)
