"""From boxes of a detector to regions for a language model: which are kept, of what class, and their vectors.

Shape letters: R regions, T those that are kept, C channels, K classes with the background, which is 0, A attributes
with "none", which is 0, F width of a feature, D width of a class's vector, h, w map of a region.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.ops.boxes import suppress, suppress_each


class Selected(NamedTuple):
    """The regions that are kept, the surest first.

    Attributes:
        numbers: (T,), which they are.
        labels: (T,), 0 the background.
        scores: (T,).
    """

    numbers: Tensor
    labels: Tensor
    scores: Tensor


def select_boxes(
    boxes_R4: Tensor,
    shares_RK: Tensor,
    *,
    threshold: float = 0.2,
    least: int = 10,
    most: int = 100,
    overlap: float = 0.3,
    agnostic: bool = False,
) -> Selected:
    """One class at most for a box, and between `least` and `most` boxes.

    Boxes that a surer one of a class overlaps are no longer of that class; a box keeps the best class that is left.
    Those of `threshold` and more stay, the surest `least` in any case, and never more than `most`.

    Args:
        boxes_R4: by their corners.
        shares_RK: probabilities of the classes.
        threshold: least score.
        least, most: how many stay.
        overlap: the largest IoU of two boxes of a class.
        agnostic: a box has its best class from the start, and boxes of all classes meet; quicker.

    Raises:
        ValueError: if boxes and probabilities do not fit together, or the numbers contradict each other.
    """
    if boxes_R4.ndim != 2 or boxes_R4.shape[1] != 4 or shares_RK.ndim != 2 or len(shares_RK) != len(boxes_R4):
        raise ValueError(
            f"boxes must be (regions, 4) and shares (regions, classes), got {tuple(boxes_R4.shape)} and "
            f"{tuple(shares_RK.shape)}"
        )
    if not 0 <= least <= most:
        raise ValueError(f"least must be at least 0 and at most {most}, got {least}")
    scores_RK = shares_RK[:, 1:]
    if agnostic:
        scores_R, labels_R = scores_RK.max(1)
        stays_R = torch.zeros_like(scores_R, dtype=torch.bool)
        stays_R[suppress(boxes_R4, scores_R, most=overlap)] = True
        scores_R = scores_R * stays_R
    else:
        scores_R, labels_R = (scores_RK * suppress_each(boxes_R4, scores_RK, most=overlap)).max(1)
    order_R = scores_R.argsort(descending=True, stable=True)
    count = min(max(int((scores_R >= threshold).sum()), least), most)
    numbers_T = order_R[:count]
    return Selected(numbers_T, labels_R[numbers_T] + 1, scores_R[numbers_T])


def region_vectors(features_RF: Tensor, boxes_R4: Tensor, size: tuple[int, int]) -> Tensor:
    """[f; x0/W; y0/H; x1/W; y1/H; (x1 - x0)/W; (y1 - y0)/H], (..., R, F + 6): what `OscarPlus` takes.

    Args:
        features_RF: f.
        boxes_R4: by their corners, in pixels.
        size: H and W of the image.
    """
    corners_R4 = boxes_R4 / boxes_R4.new_tensor([size[1], size[0]] * 2)
    return torch.cat([features_RF, corners_R4, corners_R4[..., 2:] - corners_R4[..., :2]], -1)


class AttributeHead(nn.Module):
    """What a region is like, (R, A), told its class: W2 relu(W1 [f; E(label)]), with f the mean of its map.

    Args:
        in_channels: C.
        num_classes: K.
        num_attributes: A.
        class_dim: D.
        hidden: between W1 and W2.
        told: False does without the class.

    Raises:
        ValueError: if a width is not positive.
    """

    def __init__(
        self,
        in_channels: int = 2048,
        num_classes: int = 1595,
        num_attributes: int = 525,
        class_dim: int = 256,
        hidden: int = 512,
        *,
        told: bool = True,
    ) -> None:
        super().__init__()
        if min(in_channels, num_classes, num_attributes, class_dim, hidden) < 1:
            raise ValueError(
                f"widths must be positive, got {in_channels}, {num_classes}, {num_attributes}, {class_dim} and {hidden}"
            )
        self.classes = nn.Embedding(num_classes, class_dim) if told else None
        self.inner = nn.Linear(in_channels + class_dim * told, hidden)
        self.score = nn.Linear(hidden, num_attributes)
        for module in (self.classes, self.inner, self.score):
            if module is not None:
                nn.init.normal_(module.weight, std=0.01)
        for linear in (self.inner, self.score):
            nn.init.zeros_(linear.bias)

    def hidden(self, features: Tensor, labels_R: Tensor) -> Tensor:
        """relu(W1 [f; E(label)]), of maps (R, C, h, w) or of their means (R, C)."""
        f_RC = features.mean((2, 3)) if features.ndim == 4 else features
        told_RC = f_RC if self.classes is None else torch.cat([f_RC, self.classes(labels_R)], 1)
        return F.relu(self.inner(told_RC))

    def forward(self, features: Tensor, labels_R: Tensor) -> Tensor:
        """
        Args:
            features: of each region, a map (R, C, h, w) or its mean (R, C).
            labels_R: its class, the predicted one or, in training, the true one.
        """
        return self.score(self.hidden(features, labels_R))


def attribute_loss(logits_RA: Tensor, attributes_RA: Tensor) -> Tensor:
    """The mean over regions of -sum y log softmax, y uniform over what is true; one without attributes counts as 0.

    Args:
        logits_RA: of `AttributeHead`.
        attributes_RA: 1 for what a region is like; shares that sum up to 1 as well.
    """
    total_R1 = attributes_RA.sum(1, keepdim=True)
    target_RA = attributes_RA / torch.where(total_R1 > 0, total_R1, 1)
    return -(target_RA.to(logits_RA.dtype) * logits_RA.log_softmax(1)).sum(1).sum() / max(1, len(logits_RA))
