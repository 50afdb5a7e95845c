"""BEVANet's claim at laptop size: scikit-image's coins, with and without its large-kernel attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.catalogue import Claim, ClaimResult
from saccade.extras import need
from saccade.models.bevanet.model import BEVANet, Segmentation, segmentation_loss

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab


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
    seeds = lab.size(2, 1)
    tops = (0, (image_HW.shape[0] - side) // 2, image_HW.shape[0] - side)
    windows = [(slice(top, top + side), slice(edge, edge + side)) for top in tops]
    held_out, truth = (torch.stack([whole[w] for w in windows]) for whole in (image_HW, label_HW))

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)

        def upto(n: int) -> int:
            return int(torch.randint(n, (1,), generator=generator))

        while True:
            images, labels = [], []
            for _ in range(count):
                top, left, turns = upto(image_HW.shape[0] - side), upto(edge - side), upto(4)
                window = (slice(top, top + side), slice(left, left + side))
                bright = 0.5 * torch.randn(1, generator=generator)
                images.append(image_HW[window].rot90(turns) + bright)
                labels.append(label_HW[window].rot90(turns))
            yield torch.stack(images)[:, None], torch.stack(labels)

    def loss(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        output = model(batch[0])
        assert isinstance(output, Segmentation)
        return segmentation_loss(output, batch[1], keep=count * side * side // 8)

    small: dict[str, Any] = {
        "planes": 8,
        "blocks": (1, 1, 2, 2, 2),
        "pyramid_channels": 16,
        "head_channels": 16,
        "in_channels": 1,
    }
    forms: dict[str, dict[str, Any]] = {
        "large_kernels": {},
        "plain": {"semantic_kernels": (0, 0, 0), "detail_kernels": (0, 0)},
    }
    measured: dict[str, float] = {}
    for name, kernels in forms.items():
        found, at_once = [], []
        for seed in range(lab.seed, lab.seed + seeds):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = BEVANet(2, **small, **kernels)
            lab.train(model, batches(seed), loss, 60, lr=5e-3, description=f"{name}, seed {seed}")
            model.eval()
            with torch.no_grad():
                guess = model(held_out[:, None]).logits.argmax(1)
                guess_HW = model(image_HW[None, None]).logits[0].argmax(0)
            found.append(intersection_over_union(guess, truth, 2))
            at_once.append(intersection_over_union(guess_HW[:, edge:], label_HW[:, edge:], 2))
        measured[f"{name}_iou_percent"] = sum(found) / seeds
        measured[f"{name}_spread_percent"] = max(found) - min(found)
        measured[f"{name}_at_once_iou_percent"] = sum(at_once) / seeds
        measured[f"{name}_parameters"] = float(sum(p.numel() for p in model.parameters()))
    return ClaimResult(
        measured,
        holds=measured["large_kernels_iou_percent"] > measured["plain_iou_percent"],
        note=f"means of {seeds} seeds; labels are a watershed of the photograph",
    )


CLAIM = Claim(
    paper="large-kernel attention with kernel selection gives 81.0 % mIoU on Cityscapes at 33 frames a second",
    expected="higher IoU on a photograph of coins than the same network with plain convolutions in its place",
    run=_claim,
)
