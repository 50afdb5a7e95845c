"""Which class has every pixel, and what stands out: coins, cells, vessels of a retina, and shapes on photographs.

Shape letters: B batch, C channels, K classes, S side of an image, H height, W width.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.resize import resize
from saccade.models.images import colours
from saccade.models.segmentation import decided
from saccade.train import data as sources
from saccade.train import labelled
from saccade.train.entries import Entry
from saccade.train.metrics import segmentation as scores
from saccade.train.result import Metric
from saccade.train.tasks.network import NetworkTask, shown
from saccade.train.tasks.settings import Settings

#: by their numbers
CLASSES = ("background", "coin", "cell", "vessel", "shape")
#: photographs behind shapes: those that are learned from, and those that are judged on
LEARN, JUDGE = ("chelsea", "coffee", "rocket"), ("astronaut",)
#: the share of a labelled photograph, from the left, that is learned from; what is right of it is judged on
_LEARNED = 2 / 3
#: networks halve an image as often
_STRIDE = 32
#: images are handed to networks about 0
_MIDDLE, _SPREAD = 0.5, 0.25


class PixelTask(NetworkTask):
    """Base: a number for each pixel of an image. A subclass gives what is `drawn`: images (B, 3, S, S) about 0,
    whatever else a network takes, and numbers of classes (B, S, S); and what it is judged by.

    Networks return `saccade.models.segmentation.Segmentation` or `Saliency`. Every map that one gives, auxiliary ones
    too, is held to the truth: by the cross-entropy of its pixels and one less the soft Dice of its classes; their mean
    is the loss.

    Raises:
        ValueError: if the length is no square of a side that 32 divides.
        ImportError: if scikit-image or scikit-learn is not installed.
    """

    multiple = _STRIDE
    budgets = {
        "quick": Settings(length=64**2, batch=8, steps=160, lr=3e-3, lengths=(4096, 16384, 65536), evaluation_size=48),
        "standard": Settings(
            length=96**2, batch=16, steps=1200, lr=2e-3, lengths=(4096, 16384, 65536, 262144), evaluation_size=96
        ),
        "long": Settings(
            length=128**2, batch=16, steps=6000, lr=1e-3, lengths=(4096, 16384, 65536, 262144), evaluation_size=96
        ),
    }

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """The mean of `pixel_loss` over all maps that the network gives."""
        losses = [pixel_loss(map_BKHW, batch[-1]) for map_BKHW in self.call(model, batch).maps]
        return torch.stack(losses).mean()

    def outputs(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """The logits (B, K, S, S)."""
        return self.call(model, batch).logits.float()

    @torch.no_grad()
    def answers(self, model: nn.Module, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Logits and truth of all held-out images."""
        model.eval()
        pairs = [(self.outputs(model, batch), batch[-1]) for batch in self.held_out(share)]
        logits, truth = zip(*pairs)
        return torch.cat(logits), torch.cat(truth)

    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """All scores of the task on held-out images, by name."""
        return self.scored(*self.answers(model, share))

    def scored(self, logits_BKHW: Tensor, truth_BHW: Tensor) -> dict[str, float]:
        """`figures`, of logits and truth."""
        raise NotImplementedError

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        batch = next(self.held_out())
        logits = self.outputs(model.eval(), batch)
        wrong = (decided(logits) != batch[-1])[:, None].float()
        return {
            "input": shown(batch[0] * _SPREAD + _MIDDLE), "output": shown(self.painted(logits)),
            "truth": shown(_in_colours(batch[-1], len(CLASSES))), "error": shown(wrong),
        }  # fmt: skip

    def painted(self, logits_BKHW: Tensor) -> Tensor:
        """What the network says, as pictures (B, 3 or 1, H, W)."""
        return _in_colours(decided(logits_BKHW), len(CLASSES))


class Segment(PixelTask):
    """Background, coin, cell, vessel or shape? Windows of photographs that were labelled by classical filters.

    A quarter of a batch are shapes in front of photographs; the rest are windows of the coins, the tissue and the
    retina of `saccade.train.labelled`, turned by quarters. What is judged on lies right of what is learned from, and
    in front of another photograph. Quality is the mean IoU over classes; Dice and boundary F stand beside it.
    """

    name = "segment"
    metric = Metric("mean_iou", "IoU", higher_is_better=True)

    def arguments(self, mechanism: Entry) -> dict[str, Any]:
        return {"num_classes": len(CLASSES)}

    @cached_property
    def sides(self) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
        """The labelled photographs, what is left in them and what is right; numbered by class."""
        left, right = [], []
        for number, (image, label) in enumerate((labelled.coins(), labelled.cells(), labelled.vessels()), 1):
            edge = round(_LEARNED * image.shape[2])
            left.append((image[..., :edge], number * label[..., :edge]))
            right.append((image[..., edge:], number * label[..., edge:]))
        return left, right

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        windows = count - count // 4
        image_BCSS, label_BSS = sources.crops(self.sides[judge], windows, self.side, generator, turned=True)
        if count > windows:
            behind = sources.photographs(*(JUDGE if judge else LEARN))
            scenes = labelled.shapes(count - windows, self.side, generator, behind)
            image_BCSS = torch.cat([image_BCSS, scenes.images])
            label_BSS = torch.cat([label_BSS, (scenes.labels > 0) * (len(CLASSES) - 1)])
        order = torch.randperm(count, generator=generator)  # so that the first are of every kind
        return ((image_BCSS - _MIDDLE) / _SPREAD)[order], label_BSS[order]

    def scored(self, logits_BKHW: Tensor, truth_BHW: Tensor) -> dict[str, float]:
        """Mean IoU, mean Dice and boundary F over classes."""
        found = decided(logits_BKHW)
        return {
            "mean_iou": scores.mean_iou(found, truth_BHW),
            "mean_dice": scores.mean_dice(found, truth_BHW),
            "boundary_f": scores.boundary_f(found, truth_BHW),
        }

    def chance(self) -> float | None:
        """The mean IoU of saying background everywhere."""
        return scores.mean_iou(torch.zeros_like(self.test[-1]), self.test[-1])


class Salient(PixelTask):
    """What stands out? Shapes in front of photographs, made of the same photographs; some networks see depth, too.

    A network whose `forward` takes `depth` is called with `image, depth`, any other with the image. Quality is the
    S-measure of the sigmoid of its map; mean absolute error, the largest F, IoU and boundary F stand beside it.
    """

    name = "salient"
    metric = Metric("s_measure", "S-measure", higher_is_better=True)

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        scenes = labelled.shapes(count, self.side, generator, self.behind(judge))
        return (scenes.images - _MIDDLE) / _SPREAD, scenes.depths, (scenes.labels > 0).long()

    @staticmethod
    def behind(judge: bool) -> Sequence[Tensor]:
        """The photographs of scenes that are judged on, or learned from."""
        return sources.photographs(*(JUDGE if judge else LEARN))

    def call(self, model: nn.Module, batch: tuple[Any, ...]) -> Any:
        if "depth" in inspect.signature(model.forward).parameters:
            return model(image=batch[0], depth=batch[1])
        return model(batch[0])

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """For a network of images; `part` hands those with depth the image's first channel, too."""
        return super().part_inputs(length)[:1]

    def part(self, mechanism: Entry, length: int) -> nn.Module:
        model = self.model(mechanism, 0)
        return _WithDepth(model) if "depth" in inspect.signature(model.forward).parameters else model

    def scored(self, logits_BKHW: Tensor, truth_BHW: Tensor) -> dict[str, float]:
        """S-measure, mean absolute error, largest F, and IoU and boundary F of the map above one half."""
        map_BHW, found = logits_BKHW[:, 0].sigmoid(), decided(logits_BKHW)
        return {
            "s_measure": scores.s_measure(map_BHW, truth_BHW),
            "mean_absolute_error": scores.mean_absolute_error(map_BHW, truth_BHW),
            "max_f": scores.max_f(map_BHW, truth_BHW),
            "mean_iou": scores.mean_iou(found, truth_BHW),
            "boundary_f": scores.boundary_f(found, truth_BHW),
        }

    def chance(self) -> float | None:
        """The S-measure of the same grey everywhere, the share of pixels that stand out."""
        truth = self.test[-1]
        return scores.s_measure(truth.float().mean().expand(truth.shape), truth)

    def painted(self, logits_BKHW: Tensor) -> Tensor:
        return logits_BKHW[:, :1].sigmoid()


class _WithDepth(nn.Module):
    """A network of image and depth, as one of images: for its time and memory, that depend on sizes alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Any:
        return self.network(image=image, depth=image[:, :1])


def pixel_loss(logits_BKHW: Tensor, truth_BHW: Tensor) -> Tensor:
    """Mean cross-entropy, and one less the soft Dice, (2 sum p y + 1) / (sum p + sum y + 1), meant over classes.

    Sums are over the whole batch. One map of logits is taken by its sigmoid, several by their softmax.

    Args:
        logits_BKHW: of any size; they are brought to that of the truth.
        truth_BHW: numbers of classes; 0 or 1 for one map.
    """
    classes = logits_BKHW.shape[1]
    logits_BKHW = resize(logits_BKHW.float(), truth_BHW[:, None])
    if classes == 1:
        target = truth_BHW[:, None].to(logits_BKHW.dtype)
        entropy, share = F.binary_cross_entropy_with_logits(logits_BKHW, target), logits_BKHW.sigmoid()
    else:
        target = F.one_hot(truth_BHW, classes).movedim(-1, 1).to(logits_BKHW.dtype)
        entropy, share = F.cross_entropy(logits_BKHW, truth_BHW), logits_BKHW.softmax(1)
    both, each = (share * target).sum((0, 2, 3)), (share + target).sum((0, 2, 3))
    return entropy + 1 - ((2 * both + 1) / (each + 1)).mean()


def _in_colours(label_BHW: Tensor, classes: int) -> Tensor:
    """(B, 3, H, W): background black, each class its colour."""
    palette = torch.cat([torch.zeros(1, 3), colours(classes - 1)])
    return palette[label_BHW.cpu()].permute(0, 3, 1, 2)
