"""What image backbones share: the pyramid that `features` gives, the head on its last level and what it says.

Shape letters: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from saccade import catalogue
from saccade.models.complete import Complete, labels
from saccade.models.images import captioned, middle, normalised
from saccade.ops.export import output

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from typing_extensions import Self

#: classes that are told
_TOP = 5
#: of a picture beside its bars
_HEIGHT = 224


@output
@dataclass
class ImageOutput:
    """What a backbone returns.

    Attributes:
        features: maps (B, C, H, W) from fine to coarse, of `channels` and `strides` of the backbone.
        logits: (B, K), None without a head.
        penalty: a scalar that training adds to its loss, where the network has one.
        images: (3, H, W) in [0, 1] each, as `predict` read them; None in what `forward` gives.
    """

    features: list[Tensor]
    logits: Tensor | None = None
    penalty: Tensor | None = None
    images: list[Tensor] | None = None


class Backbone(Complete):
    """Base of the image backbones; a subclass sets `slug`, `channels`, `strides` and gives `features` and `classify`.

    Attributes:
        channels, strides: of the maps that `features` gives; a stride is the input's size over the map's.
        image_size: side of the square that `predict` shows the network: a published size's own.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    image_size: int = 224

    @classmethod
    def from_config(cls, name: str, **changes: Any) -> Self:
        """`Complete.from_config`; it sees images at the size at which the paper counts."""
        model = super().from_config(name, **changes)
        (shape,) = next(size.inputs for size in catalogue.part(cls.slug).published if size.name == name).values()
        model.image_size = shape[-1]
        return model

    def features(self, x_BCHW: Tensor) -> list[Tensor]:
        """The pyramid, from fine to coarse; images of any size.

        Raises:
            ValueError: if `x` is no batch of images with the channels that the stem takes.
        """
        raise NotImplementedError

    def classify(self, x_BCHW: Tensor) -> Tensor | None:
        """Logits (B, K) of the last map; None without a head."""
        raise NotImplementedError

    def forward(self, pixel_values: Tensor) -> ImageOutput:
        """Images (B, C, H, W), as `features` takes them."""
        maps = self.features(pixel_values)
        return ImageOutput(maps, self.classify(maps[-1]))

    def see(self, images: Sequence[Tensor]) -> ImageOutput:
        squares = torch.stack([middle(image, self.image_size) for image in images])
        said: ImageOutput = self(normalised(squares, self.in_channels))
        return replace(said, images=list(images))

    def answer(self, output: ImageOutput, names: Sequence[str] | None = None) -> list[dict[str, float]]:
        """The probabilities of the likeliest classes of each image, the largest first."""
        if output.logits is None:
            raise ValueError(f"this {type(self).__name__} has no head and names no classes: build it with num_classes")
        called = labels(output.logits.shape[1], names)
        top = output.logits.float().softmax(-1).topk(min(_TOP, len(called)))
        return [
            {called[k]: share for k, share in zip(classes, shares)}
            for classes, shares in zip(top.indices.tolist(), top.values.tolist())
        ]

    def drawn(self, output: ImageOutput, names: Sequence[str] | None) -> Picture:
        return captioned(output.images or (), self.answer(output, names), _HEIGHT)


def maps_of(said: Any) -> list[Tensor]:
    """The maps that a backbone gave, from fine to coarse: a list, a `Backbone`'s output, or one of transformers.

    Raises:
        ValueError: if there are none.
    """
    maps = next((getattr(said, name) for name in ("features", "feature_maps") if hasattr(said, name)), said)
    if not isinstance(maps, (list, tuple)) or not maps or not all(isinstance(x, Tensor) and x.ndim == 4 for x in maps):
        raise ValueError(f"a backbone must give maps (batch, channels, height, width), got {type(said).__name__}")
    return list(maps)


def check_images(x_BCHW: Tensor, channels: int) -> None:
    """Raise ValueError unless `x` is (B, channels, H, W) with at least one pixel."""
    if x_BCHW.ndim != 4 or x_BCHW.shape[1] != channels or 0 in x_BCHW.shape[2:]:
        raise ValueError(f"x must be images (batch, {channels}, height, width), got {tuple(x_BCHW.shape)}")
