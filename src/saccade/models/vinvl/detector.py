"""The detector X152-C4: a ResNeXt up to stride 16, proposals, and its last stage on each of them; class and attributes.

Shape letters: B batch, C channels, H, W image, h, w map, R proposals, T regions that are kept, G objects, K classes
with the background, A attributes with "none", a anchors of a place, N all of them, p side of a pooled map, F width of
a feature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_relu
from saccade.layers.residual import Bottleneck
from saccade.models.backbone import check_images
from saccade.models.detection import Detection, Detector, Target
from saccade.models.vinvl.regions import AttributeHead, attribute_loss, region_vectors, select_boxes
from saccade.ops.boxes import suppress, to_centres, to_corners, union_shares
from saccade.ops.deformable import roi_align

if TYPE_CHECKING:
    from typing_extensions import Self

_STRIDE, _POOLED = 16, 14
#: of blue, green and red, from 0 to 255
_MEAN = (103.530, 116.280, 123.675)
#: of differences of centres and of sizes, in the second stage
_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
_LARGEST = math.log(1000 / 16)


def encode(boxes: Tensor, like: Tensor, weights: Sequence[float] = (1.0,) * 4) -> Tensor:
    """Differences of boxes from others, ((x - x') / w', (y - y') / h', log w / w', log h / h') by weights.

    Args:
        boxes, like: by their corners.
        weights: of the four.
    """
    place, other = to_centres(boxes), to_centres(like)
    moved = (place[..., :2] - other[..., :2]) / other[..., 2:]
    return torch.cat([moved, (place[..., 2:] / other[..., 2:]).log()], -1) * boxes.new_tensor(weights)


def decode(deltas: Tensor, like: Tensor, weights: Sequence[float] = (1.0,) * 4) -> Tensor:
    """The boxes, by their corners, of which `encode` gives the differences.

    Args:
        deltas: differences.
        like: from which.
        weights: of the four.
    """
    deltas, other = deltas / deltas.new_tensor(weights), to_centres(like)
    place = other[..., :2] + deltas[..., :2] * other[..., 2:]
    return to_corners(torch.cat([place, other[..., 2:] * deltas[..., 2:].clamp(max=_LARGEST).exp()], -1))


class RegionProposals(nn.Module):
    """Where something is: anchors of `sizes` and `ratios` at each place of a map.

    Args:
        channels: of the map.
        sizes: sides of square anchors in pixels.
        ratios: of height to width.
        before, after: how many stay before and after the suppression of overlaps.
    """

    def __init__(
        self,
        channels: int,
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        before: int = 6000,
        after: int = 300,
    ) -> None:
        super().__init__()
        self.sizes, self.ratios, self.before, self.after = tuple(sizes), tuple(ratios), before, after
        count = len(self.sizes) * len(self.ratios)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness, self.deltas = nn.Conv2d(channels, count, 1), nn.Conv2d(channels, 4 * count, 1)
        for conv in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def anchors(self, height: int, width: int, like: Tensor) -> Tensor:
        """(h w a, 4), by their corners."""
        sides = [(size / math.sqrt(ratio), size * math.sqrt(ratio)) for ratio in self.ratios for size in self.sizes]
        down, across = ((torch.arange(n, device=like.device) + 0.5) * _STRIDE for n in (height, width))
        middle_hw2 = torch.stack([across.expand(height, -1), down[:, None].expand(-1, width)], -1)
        sides_a2 = torch.tensor(sides, device=like.device)
        both = middle_hw2[:, :, None].expand(-1, -1, len(sides), -1), sides_a2.expand(height, width, -1, -1)
        return to_corners(torch.cat(both, -1).flatten(0, 2)).to(like.dtype)

    def forward(self, map_BChw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, h w a) of something, differences (B, h w a, 4), and the anchors."""
        y_BChw = F.relu(self.conv(map_BChw))
        logits = self.objectness(y_BChw).permute(0, 2, 3, 1).flatten(1)
        deltas = self.deltas(y_BChw).permute(0, 2, 3, 1).reshape(len(map_BChw), -1, 4)
        return logits, deltas, self.anchors(map_BChw.shape[2], map_BChw.shape[3], map_BChw)

    @torch.no_grad()
    def proposed(self, logits_N: Tensor, deltas_N4: Tensor, anchors_N4: Tensor, size: tuple[int, int]) -> Tensor:
        """The surest boxes (R, 4) of one image of size (H, W), within it."""
        best_N = logits_N.topk(min(self.before, len(logits_N))).indices
        limit = deltas_N4.new_tensor([size[1], size[0]] * 2)
        boxes_N4 = decode(deltas_N4[best_N], anchors_N4[best_N]).clamp(min=0).minimum(limit)
        real_N = ((boxes_N4[:, 2:] - boxes_N4[:, :2]) > 0).all(1)
        boxes_N4, scores_N = boxes_N4[real_N], logits_N[best_N][real_N]
        return boxes_N4[suppress(boxes_N4, scores_N, most=0.7)[: self.after]]


class RegionDetector(Detector):
    """Images (B, 3, H, W) in [0, 1] -> the regions of each: box, class, attributes, and a feature for other models.

    Args:
        num_classes: without the background.
        num_attributes: without "none".
        width: channels of the first stage, doubled by each other one.
        blocks: of the four stages.
        groups: of their 3x3 convolutions.
        stem: channels of the first convolution.
        sizes: of the anchors.
        class_dim, attribute_hidden: of `AttributeHead`.
        regress: boxes are moved by what is learned; False gives the proposals, as features were made.
        agnostic: see `select_boxes`.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "vinvl"

    def __init__(
        self,
        num_classes: int = 1594,
        num_attributes: int = 524,
        *,
        width: int = 256,
        blocks: Sequence[int] = (3, 8, 36, 3),
        groups: int = 32,
        stem: int = 64,
        sizes: Sequence[float] = (32, 64, 128, 256, 512),
        class_dim: int = 256,
        attribute_hidden: int = 512,
        regress: bool = False,
        agnostic: bool = False,
    ) -> None:
        super().__init__()
        if min(num_classes, num_attributes, width, stem, *blocks) < 1 or len(blocks) != 4:
            raise ValueError(
                f"classes, widths and four numbers of blocks must be positive, got {num_classes}, {blocks}"
            )
        self.regress, self.agnostic, self.frozen = regress, agnostic, False
        self.stem, self.pool = conv_norm_relu(3, stem, 7, 2), nn.MaxPool2d(3, 2, padding=1)
        stages, channels = [], stem
        for i, count in enumerate(blocks):
            stage = nn.Sequential()
            for j in range(count):
                stride = 2 if i and not j else 1
                stage.append(Bottleneck(channels, width << i, stride, groups=groups, expansion=1))
                channels = width << i
            stages.append(stage)
        self.stages, self.last = nn.Sequential(*stages[:3]), stages[3]
        self.proposals = RegionProposals(width << 2, sizes)
        self.to_class = nn.Linear(channels, num_classes + 1)
        self.to_deltas = nn.Linear(channels, 4 * (num_classes + 1))
        self.attributes = AttributeHead(channels, num_classes + 1, num_attributes + 1, class_dim, attribute_hidden)
        for linear, deviation in ((self.to_class, 0.01), (self.to_deltas, 0.001)):
            nn.init.normal_(linear.weight, std=deviation)
            nn.init.zeros_(linear.bias)

    def freeze(self) -> Self:
        """For fine-tuning: stem and first stage stay as they are, and so does what all norms know of their inputs."""
        for module in (self.stem, self.stages[0]):
            module.requires_grad_(False)
        self.frozen = True
        for norm in self._norms():
            norm.requires_grad_(False)
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As of any module, but for norms that are frozen."""
        super().train(mode)
        if self.frozen:
            for norm in self._norms():
                norm.eval()
        return self

    def _norms(self) -> list[nn.Module]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def map_of(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H / 16, W / 16).

        Raises:
            ValueError: if they are no colour images.
        """
        check_images(pixel_values, 3)
        x_BCHW = 255 * pixel_values.flip(1) - pixel_values.new_tensor(_MEAN)[:, None, None]
        return self.stages(self.pool(self.stem(x_BCHW)))

    def of_regions(self, map_1Chw: Tensor, boxes_R4: Tensor) -> Tensor:
        """f, (R, F), of boxes of one image."""
        inside_RCpp = roi_align([map_1Chw], boxes_R4[None], [_STRIDE], _POOLED)[0]
        return self.last(inside_RCpp).mean((2, 3))

    def forward(self, pixel_values: Tensor) -> Detection:
        """`features` (B, T, F) are `region_vectors`, `attributes` (B, T, A) probabilities; where an image has fewer
        regions than another, the last ones have a score of 0.

        Args:
            pixel_values: (B, 3, H, W) in [0, 1].

        Raises:
            ValueError: if they are no colour images.
        """
        map_BChw, size = self.map_of(pixel_values), (pixel_values.shape[2], pixel_values.shape[3])
        logits_BN, deltas_BN4, anchors_N4 = self.proposals(map_BChw)
        found = []
        for i in range(len(map_BChw)):
            boxes_R4 = self.proposals.proposed(logits_BN[i], deltas_BN4[i], anchors_N4, size)
            found.append(self._judged(map_BChw[i : i + 1], boxes_R4, size))
        longest = max(len(each[0]) for each in found)
        shares, boxes, labels, scores, features, attributes = (
            torch.stack([F.pad(x, (0, 0) * (x.ndim - 1) + (0, longest - len(x))) for x in column])
            for column in zip(*found)
        )
        shares = shares.clamp(1e-6, 1 - 1e-6)
        centres = to_centres(boxes) / boxes.new_tensor([size[1], size[0]] * 2)
        return Detection(shares.logit(), centres, boxes, labels, scores, features=features, attributes=attributes)

    def _judged(self, map_1Chw: Tensor, boxes_R4: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """Of one image: probabilities, boxes, classes, scores, vectors and attributes of the regions that are kept."""
        f_RF = self.of_regions(map_1Chw, boxes_R4)
        shares_RK = self.to_class(f_RF).softmax(1)
        kept = select_boxes(boxes_R4, shares_RK, agnostic=self.agnostic)
        f_TF, boxes_T4 = f_RF[kept.numbers], boxes_R4[kept.numbers]
        attributes_TA = self.attributes(f_TF, kept.labels).softmax(1)
        vectors = region_vectors(f_TF, boxes_T4, size)
        if self.regress:
            deltas_TK4 = self.to_deltas(f_TF).unflatten(1, (-1, 4))
            own_T4 = deltas_TK4[torch.arange(len(f_TF), device=f_TF.device), kept.labels]
            limit = own_T4.new_tensor([size[1], size[0]] * 2)
            boxes_T4 = decode(own_T4, boxes_T4, _WEIGHTS).clamp(min=0).minimum(limit)
        return shares_RK[kept.numbers, 1:], boxes_T4, kept.labels - 1, kept.scores, vectors, attributes_TA

    def loss(self, pixel_values: Tensor, targets: Sequence[Target]) -> Tensor:
        """Of the proposals, the classes, the boxes, and half that of the attributes where a target has `attributes`
        (G, A), 1 for what an object is like."""
        map_BChw, size = self.map_of(pixel_values), (pixel_values.shape[2], pixel_values.shape[3])
        logits_BN, deltas_BN4, anchors_N4 = self.proposals(map_BChw)
        losses = []
        for i, target in enumerate(targets):
            truth_G4 = to_corners(target["boxes"]) * target["boxes"].new_tensor([size[1], size[0]] * 2)
            losses.append(_proposal_loss(logits_BN[i], deltas_BN4[i], anchors_N4, truth_G4))
            boxes_R4 = self.proposals.proposed(logits_BN[i], deltas_BN4[i], anchors_N4, size)
            losses.append(self._region_loss(map_BChw[i : i + 1], torch.cat([boxes_R4, truth_G4]), truth_G4, target))
        return torch.stack(losses).sum() / max(1, len(targets))

    def _region_loss(self, map_1Chw: Tensor, boxes_R4: Tensor, truth_G4: Tensor, target: Target) -> Tensor:
        overlap_R, object_R = _nearest(boxes_R4, truth_G4)
        chosen, positive = _sampled(overlap_R >= 0.5, overlap_R < 0.5, 384, 0.5)
        f_RF = self.of_regions(map_1Chw, boxes_R4[chosen])
        count, labels_R = int(positive), torch.zeros(len(chosen), dtype=torch.long, device=f_RF.device)
        objects = object_R[chosen[:count]]
        labels_R[:count] = target["labels"][objects] + 1
        loss = F.cross_entropy(self.to_class(f_RF), labels_R)
        if not count:
            return loss
        deltas = self.to_deltas(f_RF[:count]).unflatten(1, (-1, 4))[torch.arange(count), labels_R[:count]]
        moved = encode(truth_G4[objects], boxes_R4[chosen[:count]], _WEIGHTS)
        loss = loss + F.smooth_l1_loss(deltas, moved, reduction="sum") / len(chosen)
        if "attributes" in target:
            logits = self.attributes(f_RF[:count], labels_R[:count])
            loss = loss + 0.5 * attribute_loss(logits, target["attributes"][objects])
        return loss

    def see(self, images: Sequence[Tensor]) -> Detection:
        """Of one image at a time, at its own proportions: the shorter side 600, the longer 1000 at most."""
        found = []
        for image in images:
            scale = min(600 / min(image.shape[1:]), 1000 / max(image.shape[1:]))
            size = [max(1, round(scale * n)) for n in image.shape[1:]]
            said: Detection = self(F.interpolate(image[None], size, mode="bilinear", antialias=True).clamp(0, 1))
            assert said.boxes is not None
            back = said.boxes.new_tensor([image.shape[2] / size[1], image.shape[1] / size[0]] * 2)
            found.append(replace(said, boxes=said.boxes * back))
        names = ("logits", "pred_boxes", "boxes", "labels", "scores", "features", "attributes")
        longest = max(said.logits.shape[1] for said in found)
        joined = {
            name: torch.cat([
                F.pad(x, (0, 0) * (x.ndim - 2) + (0, longest - x.shape[1]))
                for x in (getattr(said, name) for said in found)
            ])
            for name in names
        }  # fmt: skip
        return Detection(**joined, images=list(images))


def _nearest(boxes_R4: Tensor, truth_G4: Tensor) -> tuple[Tensor, Tensor]:
    """The IoU (R,) with the object that a box overlaps most, and which that is."""
    if not len(truth_G4):
        return boxes_R4.new_zeros(len(boxes_R4)), torch.zeros(len(boxes_R4), dtype=torch.long, device=boxes_R4.device)
    overlap_R, object_R = union_shares(boxes_R4, truth_G4).max(1)
    return overlap_R, object_R


def _sampled(positive: Tensor, negative: Tensor, count: int, share: float) -> tuple[Tensor, int]:
    """Numbers of at most `count` boxes, at most a share of them positive, which come first; and how many these are."""
    first, second = (x.nonzero()[:, 0] for x in (positive, negative))
    first = first[torch.randperm(len(first), device=first.device)[: int(count * share)]]
    second = second[torch.randperm(len(second), device=second.device)[: count - len(first)]]
    return torch.cat([first, second]), len(first)


def _proposal_loss(logits_N: Tensor, deltas_N4: Tensor, anchors_N4: Tensor, truth_G4: Tensor) -> Tensor:
    """Something or nothing, and where: IoU of 0.7 and more, or the best of an object, against less than 0.3."""
    overlap_N, object_N = _nearest(anchors_N4, truth_G4)
    positive_N = overlap_N >= 0.7
    if len(truth_G4):
        positive_N[union_shares(anchors_N4, truth_G4).argmax(0)] = True
    chosen, count = _sampled(positive_N, (overlap_N < 0.3) & ~positive_N, 256, 0.5)
    said = (torch.arange(len(chosen), device=chosen.device) < count).to(logits_N.dtype)
    loss = F.binary_cross_entropy_with_logits(logits_N[chosen], said)
    moved = encode(truth_G4[object_N[chosen[:count]]], anchors_N4[chosen[:count]]) if count else deltas_N4[:0]
    return loss + F.smooth_l1_loss(deltas_N4[chosen[:count]], moved, reduction="sum", beta=1 / 9) / max(1, len(chosen))
