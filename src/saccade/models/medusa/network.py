"""Medusa: a backbone, and a head for each task; tasks come and go.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from saccade.layers.resnet import ResNetTrunk
from saccade.models.backbone import check_images, maps_of
from saccade.models.medusa.parts import Gate, Scales, TaskHead, Transform
from saccade.models.multitask import Multitask, MultitaskNetwork


class Medusa(MultitaskNetwork):
    """Heads that never meet on a shared backbone.

    Args:
        tasks: their names, without dots.
        task_channels: of each task's map: the classes, or the numbers.
        numbers: the tasks whose maps of several channels are numbers, as normals are.
        backbone: gives maps from fine to coarse: a module that gives a list, a `saccade.models.backbone.Backbone`, or
            a backbone of transformers; a ResNet where None.
        channels: of these maps; the backbone's own `channels` where None.
        depth, width, stages: of the ResNet.
        blocks, supervised, msa, head_width, gate, transform, gate_bias: of the heads, see `TaskHead`; `head_width` is
            its `width`.

    Raises:
        ValueError: if names and channels do not fit, or the backbone tells no channels.
    """

    slug = "medusa"

    def __init__(
        self,
        tasks: Sequence[str] = ("segmentation", "depth", "edges", "normals"),
        task_channels: Sequence[int] = (40, 1, 1, 3),
        *,
        numbers: Collection[str] = ("normals",),
        backbone: nn.Module | None = None,
        channels: Sequence[int] | None = None,
        depth: int = 50,
        width: int = 64,
        stages: int = 4,
        blocks: int = 2,
        supervised: bool = True,
        msa: Scales = "gate_concat",
        head_width: int | None = None,
        gate: Gate = "full",
        transform: Transform = "conv3",
        gate_bias: float | None = None,
    ) -> None:
        super().__init__()
        if not tasks or len(tasks) != len(task_channels):
            raise ValueError(f"task_channels must be one for each task, got {tuple(task_channels)} for {tuple(tasks)}")
        self.backbone = ResNetTrunk(depth, width=width, stages=stages) if backbone is None else backbone
        found = getattr(self.backbone, "channels", None) if channels is None else channels
        if not found:
            raise ValueError("channels must be given for a backbone that has no attribute of that name")
        self.in_channels = getattr(self.backbone, "in_channels", 3)
        self.channels: tuple[int, ...] = tuple(found)
        self.numbers = tuple(numbers)
        self._options: dict[str, Any] = {
            "blocks": blocks, "supervised": supervised, "msa": msa, "width": head_width, "gate": gate,
            "transform": transform, "gate_bias": gate_bias,
        }  # fmt: skip
        self.heads = nn.ModuleDict()
        for task, outputs in zip(tasks, task_channels):
            self.add_task(task, outputs)

    @property
    def tasks(self) -> tuple[str, ...]:  # type: ignore[override]
        """Their names, in the order of the output."""
        return tuple(self.heads)

    def add_task(self, name: str, channels: int) -> TaskHead:
        """A fresh head, in the network's options; no other one changes.

        Args:
            name: of the task, without dots.
            channels: of its map.

        Raises:
            ValueError: if there is such a task, or the name has a dot.
        """
        if name in self.heads or "." in name or not name:
            raise ValueError(f"a task's name must be new and without dots, got {name!r} beside {', '.join(self.heads)}")
        head = TaskHead(self.channels, channels, **self._options)
        self.heads[name] = head
        return head

    def remove_task(self, name: str) -> None:
        """Without that task's head; no other one changes.

        Args:
            name: of the task.

        Raises:
            ValueError: if there is none, or no other.
        """
        if name not in self.heads or len(self.heads) == 1:
            raise ValueError(f"one of several tasks may be removed, got {name!r} of {', '.join(self.heads)}")
        del self.heads[name]

    def freeze_backbone(self) -> None:
        """The backbone as universal features: no gradients, and its norms as they are."""
        self.backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Medusa:
        super().train(mode)
        if mode and not any(parameter.requires_grad for parameter in self.backbone.parameters()):
            self.backbone.eval()
        return self

    def forward(self, pixel_values: Tensor) -> Multitask:
        """Images (B, C, H, W) of any size that the backbone takes; in training with the maps of each scale.

        Raises:
            ValueError: if they are no batch of images, or the backbone's maps do not fit.
        """
        check_images(pixel_values, self.in_channels)
        maps = maps_of(self.backbone(pixel_values))
        if len(maps) != len(self.channels):
            raise ValueError(f"the backbone must give {len(self.channels)} maps, got {len(maps)}")
        size = (pixel_values.shape[2], pixel_values.shape[3])
        answers = [head(maps, size) for head in self.heads.values()]
        side = [map_BCHW for _, maps in answers for map_BCHW in maps]
        return Multitask([logits for logits, _ in answers], side=side or None)
