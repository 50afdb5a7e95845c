"""BEVANet's claim at laptop size: scikit-image's coins, with and without its large-kernel attention."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.extras import need
from saccade.models.bevanet.model import BEVANet, Segmentation, segmentation_loss

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial


def coins() -> tuple[Tensor, Tensor]:
    """The photograph (303, 384), about 0, and its labels: 1 on coins.

    The labels are the watershed of the picture's gradient between what is surely coin and surely background, filled.
    """
    wanted = ("scipy.ndimage", "skimage.data", "skimage.filters", "skimage.segmentation")
    ndimage, data, filters, segmentation = (need(name, "the photograph of coins") for name in wanted)
    image = data.coins()
    markers = (image < 30) * 1 + (image > 150) * 2
    filled = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(image), markers) == 2)
    kept = ndimage.binary_opening(filled, iterations=3)
    grey = torch.as_tensor(image.copy()).float()
    return (grey - grey.mean()) / grey.std(), torch.as_tensor(kept).long()


def intersection_over_union(found: Tensor, truth: Tensor, classes: int) -> float:
    """Mean over classes, in percent."""
    shares = [((found == k) & (truth == k)).sum() / ((found == k) | (truth == k)).sum() for k in range(classes)]
    return 100 * float(torch.stack(shares).mean())


def _claim(lab: Lab) -> ClaimResult:
    """Learn from the left of the photograph, be judged on its right, in windows as large as those learned from.

    Beside it the same part of the whole photograph seen at once, which is context of a kind that was not learned from.
    Two seeds, equal steps.
    """
    image_HW, label_HW = coins()
    side, count, edge = lab.size(128, 64), lab.size(4, 2), 256
    tops = (0, (image_HW.shape[0] - side) // 2, image_HW.shape[0] - side)
    windows = [(slice(top, top + side), slice(edge, edge + side)) for top in tops]
    held_out, truth = (torch.stack([whole[w] for w in windows]) for whole in (image_HW, label_HW))

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for _ in range(count):
            image, label = lab.data.crops([(image_HW, label_HW)], 1, side, generator, turned=True, within=edge)
            images.append(image + 0.5 * torch.randn(1, generator=generator))  # brighter or darker
            labels.append(label)
        return torch.stack(images), torch.cat(labels)

    def loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        output = model(batch[0])
        assert isinstance(output, Segmentation)
        return segmentation_loss(output, batch[1], keep=count * side * side // 8)

    def measure(trial: Trial) -> dict[str, float]:
        guess = trial.model(held_out[:, None]).logits.argmax(1)
        guess_HW = trial.model(image_HW[None, None]).logits[0].argmax(0)
        return {
            "iou_percent": intersection_over_union(guess, truth, 2),
            "at_once_iou_percent": intersection_over_union(guess_HW[:, edge:], label_HW[:, edge:], 2),
            "parameters": trial.parameters,
        }

    small: dict[str, Any] = {
        "planes": 8,
        "blocks": (1, 1, 2, 2, 2),
        "pyramid_channels": 16,
        "head_channels": 16,
        "in_channels": 1,
    }
    forms = {
        "large_kernels": partial(BEVANet, 2, **small),
        "plain": partial(BEVANet, 2, **small, semantic_kernels=(0, 0, 0), detail_kernels=(0, 0)),
    }
    trials = lab.forms(forms, draw, measure, 60, loss=loss, lr=5e-3, seeds=2)
    measured = trials.means() | trials.spreads("{form}_spread_percent", "iou_percent")
    return ClaimResult(
        measured,
        holds=measured["large_kernels_iou_percent"] > measured["plain_iou_percent"],
        note="means of 2 seeds; labels are a watershed of the photograph",
    )


CLAIM = Claim(
    paper="large-kernel attention with kernel selection gives 81.0 % mIoU on Cityscapes at 33 frames a second",
    expected="higher IoU on a photograph of coins than the same network with plain convolutions in its place",
    run=_claim,
)
