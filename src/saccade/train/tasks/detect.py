"""Digits and shapes on photographs are found, each with its class and its box.

Shape letters: B batch, G objects of an image, N boxes, H height, W width.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from saccade.models.average_precision import Boxes, average_precision
from saccade.models.detection import Detector, surest
from saccade.models.images import colours
from saccade.train import data as sources
from saccade.train.data import generator_at
from saccade.train.data.scenes import CLASSES, Scenes, corners_in_pixels, scenes
from saccade.train.entries import Entry
from saccade.train.result import Metric
from saccade.train.tasks.base import HELD_OUT, TRAIN
from saccade.train.tasks.network import NetworkTask, shown
from saccade.train.tasks.settings import Settings

#: photographs on which is learned, and those on which is judged
LEARN, JUDGE = ("chelsea", "coffee", "rocket"), ("astronaut",)
#: scenes that are learned from
SCENES = 512
#: boxes of this score and more are drawn
_DRAWN = 0.5


class Detect(NetworkTask):
    """Where is which shape, and where a digit? A few hundred generated scenes, half of them mirrored at each step.

    A network gives a `Detection` on images, and its own `loss(images, targets)` (`saccade.models.detection`). Quality
    is COCO's AP on scenes of other digits on another photograph.

    Raises:
        ValueError: if the length has no square.
        ImportError: if scikit-image or scikit-learn is not installed.
    """

    name = "detect"
    metric = Metric("ap", "AP", higher_is_better=True)
    budgets = {
        "quick": Settings(length=4096, batch=8, steps=300, lr=1e-3, lengths=(1024, 4096, 16384), evaluation_size=64),
        "standard": Settings(
            length=4096, batch=16, steps=2000, lr=1e-3, lengths=(1024, 4096, 16384, 65536), evaluation_size=128
        ),
        "long": Settings(
            length=9216, batch=16, steps=10000, lr=5e-4, lengths=(1024, 4096, 16384, 65536), evaluation_size=128
        ),
    }

    def arguments(self, mechanism: Entry) -> dict[str, Any]:
        return {"num_classes": len(CLASSES)}

    @cached_property
    def learned(self) -> Scenes:
        """The scenes of training."""
        return self._scenes(LEARN, sources.digits().train_images, SCENES, TRAIN)

    @cached_property
    def judged(self) -> Scenes:
        """The held-out scenes."""
        return self._scenes(JUDGE, sources.digits().test_images, self.settings.evaluation_size, HELD_OUT)

    def _scenes(self, names: tuple[str, ...], digits: Tensor, count: int, stream: int) -> Scenes:
        generator = generator_at(0, 0, stream)
        photographs = [(image,) for image in sources.photographs(*names)]
        (windows,) = sources.crops(photographs, count, self.side, generator)
        return scenes(windows, digits, generator)

    def batch(self, seed: int, step: int) -> tuple[Any, ...]:
        """Images, and of each object class and box (B, G, 5), as `to_targets` reads them."""
        generator = generator_at(seed, step, TRAIN)
        chosen = torch.randint(SCENES, (self.settings.batch,), generator=generator)
        images, labels, boxes = (part[chosen] for part in self.learned)
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        flipped = torch.cat([1 - boxes[..., :1], boxes[..., 1:]], -1)
        boxes = torch.where(mirrored[:, None, None], flipped, boxes)
        return self.to_device((images, torch.cat([labels[..., None], boxes], -1)))

    @cached_property
    def test(self) -> tuple[Tensor, ...]:
        return self.judged.images, torch.cat([self.judged.labels[..., None], self.judged.boxes], -1)

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """The network's own."""
        assert isinstance(model, Detector)
        return model.loss(batch[0], to_targets(batch[-1]))

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """`ap`, `ap50` and `ap75` on held-out scenes."""
        model.eval()
        found, truth = [], []
        overlap = getattr(model, "overlap", None)
        for batch in self.held_out(share):
            sizes_B2 = torch.full((len(batch[0]), 2), float(self.side), device=self.device)
            for parts in zip(*surest(self.call(model, batch), sizes_B2, 100, overlap)):
                found.append(Boxes(*(part.cpu() for part in parts)))
            for target in to_targets(batch[-1].cpu()):
                truth.append(Boxes(corners_in_pixels(target["boxes"], self.side, self.side), target["labels"]))
        return average_precision(found, truth)

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """Held-out scenes with the boxes that are there and those that are found, a colour for each class."""
        batch = next(self.held_out())
        sizes_B2 = torch.full((len(batch[0]), 2), float(self.side), device=self.device)
        found = surest(self.call(model.eval(), batch), sizes_B2, 100, getattr(model, "overlap", None))
        drawn, real = batch[0].clone(), batch[0].clone()
        for i, (boxes, labels, scores) in enumerate(zip(*found)):
            _outline(drawn[i], boxes[scores >= _DRAWN], labels[scores >= _DRAWN])
        for i, target in enumerate(to_targets(batch[-1])):
            _outline(real[i], corners_in_pixels(target["boxes"], self.side, self.side), target["labels"])
        return {"input": shown(batch[0]), "found": shown(drawn), "truth": shown(real)}


def to_targets(truth_BG5: Tensor) -> list[dict[str, Tensor]]:
    """The targets of a `Detector` from class (-1: no object) and box of each object."""
    there = [image[image[:, 0] >= 0] for image in truth_BG5]
    return [{"labels": image[:, 0].long(), "boxes": image[:, 1:]} for image in there]


def _outline(image_3HW: Tensor, boxes_N4: Tensor, labels_N: Tensor) -> None:
    """Draw boxes into an image, in place."""
    palette, (height, width) = colours(len(CLASSES)).to(image_3HW), image_3HW.shape[1:]
    for box, label in zip(boxes_N4.round().long().tolist(), labels_N.tolist()):
        x0, x1 = (min(max(edge, 0), width - 1) for edge in (box[0], box[2] - 1))
        y0, y1 = (min(max(edge, 0), height - 1) for edge in (box[1], box[3] - 1))
        colour = palette[label][:, None]
        image_3HW[:, y0, x0 : x1 + 1] = image_3HW[:, y1, x0 : x1 + 1] = colour
        image_3HW[:, y0 : y1 + 1, x0] = image_3HW[:, y0 : y1 + 1, x1] = colour
