"""Networks that answer several dense tasks at once, each by maps of its own: their output, and its picture.

Shape letters: B batch, T tasks, R rows of the batch that have a task, O channels of a task, H height, W width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from saccade.models.complete import Complete, batch
from saccade.models.images import beside, colours, normalised, stacked, to_picture
from saccade.models.segmentation import decided
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture


@output
@dataclass
class Multitask:
    """What a network says of several tasks.

    Attributes:
        logits: (R, O, H, W) of each of T tasks, at the images' size, in the order of the network's `tasks`.
        rows: (R,) of each task: which images of the batch it was asked of; None where of all.
        side: (R, O, h, w), coarser maps of the same tasks, as many of each, those of a task together from fine to
            coarse; in training only, of networks that are trained by them.
        images: (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward` gives.
    """

    logits: list[Tensor]
    rows: list[Tensor] | None = None
    side: list[Tensor] | None = None
    images: list[Tensor] | None = None


class MultitaskNetwork(Complete):
    """Base of the networks of several tasks; a subclass gives `forward`, which asks every task of every image.

    Attributes:
        tasks: their names, in order.
        numbers: of these, the tasks whose maps are numbers (depth, normals, edges ...) and not logits of classes; a
            map of one channel is numbers always.
    """

    tasks: Sequence[str] = ()
    numbers: Collection[str] = ()

    def see(self, images: Sequence[Tensor]) -> Multitask:
        said: Multitask = self(normalised(batch(images), self.in_channels))
        return replace(said, images=list(images))

    def answer(self, output: Multitask, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """Of a task of classes the share of the pixels of its commonest class, of one of numbers their mean.

        Args:
            names: of the tasks; the network's own where None.

        Raises:
            ValueError: if there are not as many names.
        """
        said: list[dict[str, Any]] = [{} for _ in output.logits[0]]
        for name, task, maps in zip(self._called(names), self.tasks, output.logits):
            for row, map_OHW in zip(said, maps):
                if self._is_number(task, map_OHW):
                    row[name] = f"{float(map_OHW.float().mean()):.3g} on average"
                else:
                    counts = decided(map_OHW[None]).flatten().bincount()
                    row[f"{name}: class {int(counts.argmax())}"] = float(counts.max()) / float(counts.sum())
        return said

    def drawn(self, output: Multitask, names: Sequence[str] | None) -> Picture:
        """Each image beside its maps: classes in colours, numbers from black (the least) to white."""
        self._called(names)
        rows = []
        for i, image in enumerate(output.images or ()):
            maps = [self._painted(task, logits[i]) for task, logits in zip(self.tasks, output.logits)]
            rows.append(beside([to_picture(each) for each in (image, *maps)]))
        return stacked(rows)

    def _called(self, names: Sequence[str] | None) -> Sequence[str]:
        if names is not None and len(names) != len(self.tasks):
            raise ValueError(f"names must be one for each of {len(self.tasks)} tasks, got {len(names)}")
        return self.tasks if names is None else names

    def _is_number(self, task: str, map_OHW: Tensor) -> bool:
        return task in self.numbers or map_OHW.shape[0] == 1

    def _painted(self, task: str, map_OHW: Tensor) -> Tensor:
        if not self._is_number(task, map_OHW):
            return colours(map_OHW.shape[0])[decided(map_OHW[None])[0].cpu()].permute(2, 0, 1)
        shown = map_OHW if map_OHW.shape[0] == 3 else map_OHW.mean(0, keepdim=True).expand(3, -1, -1)
        low, high = shown.aminmax()
        return (shown.float() - low) / (high - low).clamp(min=1e-12)
