"""Networks that say what fills each voxel of a scene: their output, and a picture of it from above.

Shape letters: B scenes, K classes (0 is free), X, Y, Z voxels along the axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade.models.complete import labels
from saccade.models.images import beside, colours, stacked, to_picture
from saccade.models.scene import Scene, SceneNetwork
from saccade.ops.export import output
from saccade.ops.rays import project, projection

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

#: pixels of the longer side of a grid seen from above
_SIDE = 320


@output
@dataclass
class Occupancy:
    """The class of each voxel.

    Attributes:
        logits: (B, K, X, Y, Z); class 0 is free.
        side: logits (B, K, X, Y, Z) of further classifiers that training has.
        depth: (B, V, D, h, w), what a network thinks of the depth of its images' cells, as logits; None without.
        images: (3, H, W) in [0, 1] each, the views that were given; None in what `forward` gives.
    """

    logits: Tensor
    side: list[Tensor] | None = None
    depth: Tensor | None = None
    images: list[Tensor] | None = None


class OccupancyNetwork(SceneNetwork):
    """Base of the networks of cameras and a scanner; a subclass takes images, extrinsics, intrinsics and points.

    Attributes:
        num_classes: K.
    """

    num_classes: int

    def see_scene(self, scene: Scene) -> Occupancy:
        """
        Raises:
            ValueError: if the scene has no points, or no view shows any of them.
        """
        if scene.points is None:
            raise ValueError("a scene for occupancy must name its points")
        size = (scene.images.shape[2], scene.images.shape[3])
        if not project(scene.points, projection(scene.intrinsics, scene.extrinsics), size).seen.any():
            raise ValueError(
                f"no view shows any of the {len(scene.points)} points: are cameras and points in one world?"
            )
        said: Occupancy = self(
            images=scene.images[None],
            extrinsics=scene.extrinsics[None],
            intrinsics=scene.intrinsics[None],
            points=scene.points[None],
        )
        return replace(said, images=list(scene.images))

    def answer(self, output: Occupancy, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The share of the voxels that each class fills, for the scene.

        Raises:
            ValueError: if the names are not as many as the classes.
        """
        called = labels(self.num_classes, names)
        return [
            {name: float((each == k).float().mean()) for k, name in enumerate(called)}
            for each in output.logits.argmax(1)
        ]

    def drawn(self, output: Occupancy, names: Sequence[str] | None) -> Picture:
        """The views, and beside them the grid from above: of each column the topmost voxel that is not free."""
        labels(self.num_classes, names)
        seen = from_above(output.logits[0].argmax(0))
        palette = torch.cat([torch.zeros(1, 3), colours(self.num_classes - 1)])
        image = palette[seen.cpu()].permute(2, 1, 0).flip(1)  # x to the right, y upwards
        scale = max(1, _SIDE // max(image.shape[1:]))
        image = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        return beside([stacked([to_picture(view) for view in output.images or ()]), to_picture(image)])


def from_above(classes_XYZ: Tensor) -> Tensor:
    """Of each column of voxels the class of the topmost that is not free, (X, Y); 0 where all are.

    Args:
        classes_XYZ: class numbers, z upwards.

    >>> from_above(torch.tensor([[[2, 1, 0], [0, 0, 0]]]))
    tensor([[1, 0]])
    """
    Z = classes_XYZ.shape[2]
    height_Z = torch.arange(1, Z + 1, device=classes_XYZ.device)
    top_XY = ((classes_XYZ > 0) * height_Z).amax(2)
    return classes_XYZ.gather(2, (top_XY - 1).clamp(min=0)[..., None])[..., 0] * (top_XY > 0)
