"""StyA2K's network: VGG-19 of both images, key-wise attention at three of its layers, and a decoder.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.catalogue.authors import load_state, read_checkpoint
from saccade.models.backbone import check_images
from saccade.models.images import stacked, to_picture
from saccade.models.restoration import Restorer, SuperResolved
from saccade.models.stya2k.attention import A2K, start

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from typing_extensions import Self

#: channels of relu1_1 to relu5_1
WIDTHS = (64, 128, 256, 512, 512)
#: convolutions of VGG-19 before each pooling
_CONVOLUTIONS = (2, 2, 4, 4)
#: pixels of a side, at the least: the padding by reflection needs two positions at relu5_1
_LEAST = 17


class Encoder(nn.Module):
    """VGG-19 up to relu5_1, frozen: colours by a 1 x 1 convolution first, padding by reflection, sizes rounded up.

    Args:
        widths: channels of relu1_1 to relu5_1.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 3, 1)
        inputs = (3, *widths)
        self.stages = nn.ModuleList(
            nn.ModuleList(_conv(inputs[stage] if first else width, width) for first in (True, *[False] * (count - 1)))
            for stage, (width, count) in enumerate(zip(widths, (*_CONVOLUTIONS, 1), strict=True))
        )
        self.requires_grad_(False)

    def forward(self, images_B3HW: Tensor) -> list[Tensor]:
        """relu1_1, .., relu5_1 of images in [0, 1]."""
        features, x_BCHW = [], self.colours(images_B3HW)
        for number, stage in enumerate(self.stages):
            assert isinstance(stage, nn.ModuleList)
            if number:
                x_BCHW = F.max_pool2d(x_BCHW, 2, ceil_mode=True)
            for place, conv in enumerate(stage):
                x_BCHW = F.relu(conv(x_BCHW))
                if place == 0:
                    features.append(x_BCHW)
        return features


class Transform(nn.Module):
    """Attention at relu4_1 and relu5_1, added at the former's size, and a 3 x 3 convolution.

    Args:
        dim: C of both layers.
        num_heads, regions: of attention at relu4_1 and relu5_1.
    """

    def __init__(self, dim: int = 512, num_heads: int = 8, regions: tuple[int, int] = (8, 4)) -> None:
        super().__init__()
        self.attention4, self.attention5 = (A2K(dim, region, num_heads) for region in regions)
        self.merge = _conv(dim, dim)
        start(self.merge)

    def forward(self, content4: Tensor, style4: Tensor, content5: Tensor, style5: Tensor) -> Tensor:
        fine_BCHW = self.attention4(content4, style4)
        return self.merge(fine_BCHW + _grown(self.attention5(content5, style5), fine_BCHW))


class Decoder(nn.Module):
    """From relu4_1's size to the image's, by nearest neighbours and convolutions.

    Args:
        widths: channels of relu1_1 to relu4_1.
        skip: attention at relu3_1 comes beside what is decoded there.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS, skip: bool = True) -> None:
        super().__init__()
        one, two, three, four = widths[:4]
        self.first = _conv(four, three)
        beside = 2 * three if skip else three
        widths = (beside, three, three, three, two, two, one, one, 3)
        self.convs = nn.ModuleList(map(_conv, widths[:-1], widths[1:]))
        self.apply(start)

    def forward(self, x_BCHW: Tensor, skip_BCHW: Tensor | None, features: Sequence[Tensor]) -> Tensor:
        """(B, 3, H, W), where relu1_1 is H x W.

        Args:
            x_BCHW: of relu4_1's size.
            skip_BCHW: of relu3_1's size.
            features: the content's relu1_1 to relu3_1, whose sizes are met.
        """
        x_BCHW = _grown(F.relu(self.first(x_BCHW)), features[2])
        if skip_BCHW is not None:
            x_BCHW = torch.cat([x_BCHW, skip_BCHW], 1)
        larger = {4: features[1], 6: features[0]}
        for number, conv in enumerate(self.convs):
            if number in larger:
                x_BCHW = _grown(x_BCHW, larger[number])
            x_BCHW = conv(x_BCHW if number == 0 else F.relu(x_BCHW))
        return x_BCHW


class StyA2K(Restorer):
    """The content in the manner of the style.

    Args:
        widths: channels of VGG-19's five layers; the last two are equal.
        num_heads: of attention, divides the last three widths.
        regions: sides of regions at relu3_1, relu4_1 and relu5_1.
        skip: attention at relu3_1 too.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "stya2k"
    views = ("content", "style")

    def __init__(
        self,
        widths: Sequence[int] = WIDTHS,
        *,
        num_heads: int = 8,
        regions: Sequence[int] = (8, 8, 4),
        skip: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) != 5 or min(widths) < 1 or widths[3] != widths[4]:
            raise ValueError(f"widths must be five, positive, and the last two equal, got {tuple(widths)}")
        if len(regions) != 3:
            raise ValueError(f"regions must be three, got {tuple(regions)}")
        self.encoder = Encoder(widths)
        self.attention3 = A2K(widths[2], regions[0], num_heads) if skip else None
        self.transform = Transform(widths[3], num_heads, (regions[1], regions[2]))
        self.decoder = Decoder(widths, skip)

    def forward(self, content: Tensor, style: Tensor) -> SuperResolved:
        """Images (B, 3, H, W) and (B, 3, H', W') in [0, 1].

        Raises:
            ValueError: if they are no colour images, smaller than 17 pixels, or their batches differ.
        """
        for name, images in (("content", content), ("style", style)):
            check_images(images, 3)
            if min(images.shape[2:]) < _LEAST:
                raise ValueError(f"{name} must have {_LEAST} pixels a side or more, got {tuple(images.shape[2:])}")
        if len(content) != len(style):
            raise ValueError(f"content and style must be as many images, got {len(content)} and {len(style)}")
        return SuperResolved(self.stylise(self.encoder(content), self.encoder(style)))

    def stylise(self, content: Sequence[Tensor], style: Sequence[Tensor]) -> Tensor:
        """The image of the features of both.

        Args:
            content, style: relu1_1 to relu5_1 of each.
        """
        skip = None if self.attention3 is None else self.attention3(content[2], style[2])
        x_BCHW = self.transform(content[3], style[3], content[4], style[4])
        return self.decoder(x_BCHW, skip, content)

    @classmethod
    def from_files(cls, files: Mapping[str, str | Path], **changes: Any) -> Self:
        """The network with the authors' weights, which are released in a file for each part.

        Args:
            files: of "encoder" (the usual normalised VGG-19), "A2K", "transform" and "decoder".
            **changes: constructor arguments.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if one is missing or does not fit.
        """
        model = cls(**changes)
        state = {f"{part}.{name}": x for part, path in files.items() for name, x in read_checkpoint(path).items()}
        load_state(model, catalogue.port(cls.slug, cls.authors_module).convert(state))
        return model.eval()

    def see(self, images: Sequence[Tensor]) -> SuperResolved:
        content, style = images
        return SuperResolved(self(content[None], style[None]).image.clamp(0, 1), list(images))

    def answer(self, output: SuperResolved, names: Sequence[str] | None = None) -> list[dict[str, str]]:
        """The sizes of both."""
        sizes = (f"{image.shape[2]} x {image.shape[1]}" for image in output.images or ())
        return [dict(zip(self.views, sizes, strict=False))]

    def drawn(self, output: SuperResolved, names: Sequence[str] | None) -> Picture:
        """Content, style and what was made of them."""
        return stacked([to_picture(image) for image in (*(output.images or ()), output.image[0])])


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect")


def _grown(x_BCHW: Tensor, like_BCHW: Tensor) -> Tensor:
    """By nearest neighbours to the size of the next finer map: twice its own, or one less."""
    H, W = like_BCHW.shape[2:]
    return x_BCHW.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., :H, :W]
