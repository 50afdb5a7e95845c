"""Training: who is matched with whom, the losses on every layer, and the optimiser's groups.

Shape letters: B batch, N queries, K classes, G objects of an image, M matched pairs of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.extras import need
from saccade.models.detection import Detection, Target
from saccade.models.rt_detrv2.denoising import Noised
from saccade.ops.boxes import to_corners, union_shares

#: of an image, queries and the objects that they are matched with
Match = tuple[Tensor, Tensor]


class HungarianMatcher:
    """Each object gets the query that costs least, all objects together.

        cost = 2 focal + 5 |box - box'|_1 - 2 GIoU
        focal = a (1 - p)^g (-log(p + 1e-8)) - (1 - a) p^g (-log(1 - p + 1e-8)),   p of the object's class

    Args:
        cost_class, cost_box, cost_giou: the three weights.
        alpha, gamma: a and g.
    """

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_box: float = 5.0,
        cost_giou: float = 2.0,
        *,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        self.cost_class, self.cost_box, self.cost_giou = cost_class, cost_box, cost_giou
        self.alpha, self.gamma = alpha, gamma

    def cost(self, logits_NK: Tensor, boxes_N4: Tensor, target: Target) -> Tensor:
        """(N, G), of one image."""
        p_NG = logits_NK.float().sigmoid()[:, target["labels"]]
        present = self.alpha * (1 - p_NG) ** self.gamma * -(p_NG + 1e-8).log()
        absent = (1 - self.alpha) * p_NG**self.gamma * -(1 - p_NG + 1e-8).log()
        box_N4, box_G4 = boxes_N4.float(), target["boxes"].float()
        distance = (box_N4[:, None] - box_G4).abs().sum(-1)
        overlap = union_shares(to_corners(box_N4), to_corners(box_G4), generalized=True)
        return self.cost_class * (present - absent) + self.cost_box * distance - self.cost_giou * overlap

    @torch.no_grad()
    def __call__(self, logits_BNK: Tensor, boxes_BN4: Tensor, targets: Sequence[Target]) -> list[Match]:
        """The matches of each image, by the number of their query.

        Raises:
            ImportError: where scipy is missing.
        """
        assign = need("scipy.optimize", "Hungarian matching").linear_sum_assignment
        found = []
        for logits_NK, boxes_N4, target in zip(logits_BNK, boxes_BN4, targets, strict=True):
            rows, columns = assign(self.cost(logits_NK, boxes_N4, target).cpu().numpy())
            found.append((torch.as_tensor(rows).to(boxes_N4.device), torch.as_tensor(columns).to(boxes_N4.device)))
        return found


def varifocal_loss(
    logits_BNK: Tensor, labels_BN: Tensor, quality_BN: Tensor, alpha: float = 0.75, gamma: float = 2.0
) -> Tensor:
    """Binary cross entropy to the quality of a match, summed; other classes weigh a p^g, matched ones their quality.

    Args:
        logits_BNK: of K classes.
        labels_BN: the class of a query's object, K where it has none.
        quality_BN: IoU of its box with the object's, 0 where it has none.
        alpha, gamma: a and g.
    """
    own_BNK = F.one_hot(labels_BN, logits_BNK.shape[2] + 1)[..., :-1].to(logits_BNK.dtype)
    quality_BNK = quality_BN[..., None] * own_BNK
    weight = alpha * logits_BNK.detach().sigmoid() ** gamma * (1 - own_BNK) + quality_BNK
    return F.binary_cross_entropy_with_logits(logits_BNK, quality_BNK, weight, reduction="sum")


class Criterion(nn.Module):
    """Varifocal, L1 and GIoU losses of every layer, each matched anew, over the number of objects.

    Args:
        vfl, bbox, giou: their weights.
        alpha, gamma: of `varifocal_loss`.
        matcher: its own where None.
    """

    def __init__(
        self,
        vfl: float = 1.0,
        bbox: float = 5.0,
        giou: float = 2.0,
        *,
        alpha: float = 0.75,
        gamma: float = 2.0,
        matcher: HungarianMatcher | None = None,
    ) -> None:
        super().__init__()
        self.weights = {"vfl": vfl, "bbox": bbox, "giou": giou}
        self.alpha, self.gamma, self.matcher = alpha, gamma, matcher or HungarianMatcher()

    def forward(self, output: Detection, targets: Sequence[Target]) -> dict[str, Tensor]:
        """The weighted losses by name; their sum is what is learned.

        Names end in nothing for the last layer, in `_aux_i` for the earlier, `_enc_0` for the cells that became
        queries, `_dn_i` for the layers on queries of denoising.

        Args:
            output: of a training forward, `Trained`, or any `Detection`.
            targets: of each image: `labels` (G,) and `boxes` (G, 4) as (cx, cy, w, h) in [0, 1].

        Raises:
            ValueError: if there are not as many targets as images, or their boxes do not fit their labels.
        """
        check_targets(targets, len(output.logits), output.logits.shape[2])
        count = number_of_objects(targets, output.logits.device)
        losses = self.of_layer(output, targets, count, "")
        for i, layer in enumerate(getattr(output, "auxiliary", None) or ()):
            losses |= self.of_layer(layer, targets, count, f"_aux_{i}")
        for i, layer in enumerate(getattr(output, "proposals", None) or ()):
            agnostic = layer.logits.shape[2] == 1 and output.logits.shape[2] > 1
            losses |= self.of_layer(layer, _without_classes(targets) if agnostic else targets, count, f"_enc_{i}")
        noised: Noised | None = getattr(output, "noised", None)
        if noised is not None:
            objects = [torch.arange(len(t["labels"]), device=count.device).repeat(noised.groups) for t in targets]
            matches = list(zip(noised.positive, objects))
            for i, layer in enumerate(getattr(output, "denoised", None) or ()):
                losses |= self.of_layer(layer, targets, count * noised.groups, f"_dn_{i}", matches)
        return losses

    def of_layer(
        self,
        layer: Detection,
        targets: Sequence[Target],
        count: Tensor,
        suffix: str,
        matches: Sequence[Match] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of one layer; matched here where `matches` is None."""
        logits_BNK, boxes_BN4 = layer.logits.float(), layer.pred_boxes.float()
        if matches is None:
            matches = self.matcher(logits_BNK, boxes_BN4, targets)
        image = torch.cat([torch.full_like(query, b) for b, (query, _) in enumerate(matches)])
        query = torch.cat([query for query, _ in matches])
        own_M4 = boxes_BN4[image, query]
        true_M4 = torch.cat([target["boxes"].float()[chosen] for target, (_, chosen) in zip(targets, matches)])
        label = torch.cat([target["labels"][chosen] for target, (_, chosen) in zip(targets, matches)])
        labels_BN = torch.full_like(logits_BNK[..., 0], logits_BNK.shape[2], dtype=torch.long)
        labels_BN[image, query] = label
        quality_BN = torch.zeros_like(logits_BNK[..., 0])
        share_M, overlap_M = (
            union_shares(to_corners(own_M4)[:, None], to_corners(true_M4)[:, None], generalized=kind).flatten()
            for kind in (False, True)
        )
        quality_BN[image, query] = share_M.detach()
        losses = {
            "vfl": varifocal_loss(logits_BNK, labels_BN, quality_BN, self.alpha, self.gamma),
            "bbox": F.l1_loss(own_M4, true_M4, reduction="sum"),
            "giou": (1 - overlap_M).sum(),
        }
        return {f"loss_{name}{suffix}": self.weights[name] * loss / count for name, loss in losses.items()}


def check_targets(targets: Sequence[Target], images: int, num_classes: int) -> None:
    """Raise ValueError unless there is a target for each image, with a class and a box of each object."""
    if len(targets) != images:
        raise ValueError(f"targets must be one for each of {images} images, got {len(targets)}")
    for target in targets:
        labels, boxes = target["labels"], target["boxes"]
        if labels.ndim != 1 or tuple(boxes.shape) != (len(labels), 4):
            found = f"{tuple(labels.shape)} and {tuple(boxes.shape)}"
            raise ValueError(f"targets must have labels (G,) and boxes (G, 4), got shapes {found}")
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise ValueError(
                f"labels must be from 0 to {num_classes - 1}, got {int(labels.min())} to {int(labels.max())}"
            )


def number_of_objects(targets: Sequence[Target], device: torch.device) -> Tensor:
    """All objects of a batch, at least 1; the mean over processes where several train together."""
    count = torch.tensor(float(sum(len(target["labels"]) for target in targets)), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(count)
        count = count / torch.distributed.get_world_size()
    return count.clamp(min=1)


def parameter_groups(
    model: nn.Module, lr: float = 1e-4, backbone_lr: float | None = None, weight_decay: float = 1e-4
) -> list[dict[str, Any]]:
    """Groups for AdamW (betas 0.9 and 0.999): the backbone at a rate of its own, norms without decay.

    Args:
        model: an `RTDETRv2`, or anything with a `backbone`.
        lr: of all else.
        backbone_lr: the published one for the model's backbone where None: `BACKBONE_RATES`.
        weight_decay: of all but norms.
    """
    if backbone_lr is None:
        backbone_lr = BACKBONE_RATES.get(getattr(model, "backbone_name", ""), lr)
    kinds = (nn.LayerNorm, nn.BatchNorm2d)
    norms = {id(p) for module in model.modules() if isinstance(module, kinds) for p in module.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = backbone_lr if name.startswith("backbone.") else lr
            groups.setdefault((rate, 0.0 if id(parameter) in norms else weight_decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


#: learning rates of the backbones, where the rest has 1e-4
BACKBONE_RATES: Mapping[str, float] = {
    "R18": 1e-4, "R34": 5e-5, "R50": 1e-5, "R101": 1e-6, "HGNetv2-L": 5e-6, "HGNetv2-X": 1e-6, "HGNetv2-H": 5e-6,
}  # fmt: skip


def warm_up(step: int, steps: int = 2000) -> float:
    """The share of the learning rate: linear up to 1, then constant.

    Args:
        step: from 0.
        steps: until it is 1.
    """
    return min(1.0, (step + 1) / steps)


def average_decay(step: int, decay: float = 0.9999, steps: int = 2000) -> float:
    """How much of the running mean of the weights, which is what is evaluated, remains: less at first.

    Args:
        step: from 1.
        decay: in the end.
        steps: in which it comes within a share 1 / e of that.
    """
    return decay * (1 - math.exp(-step / steps))


def _without_classes(targets: Sequence[Target]) -> list[Target]:
    return [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
