"""The decoder of the three parts, and a network of it with any encoder; the loss that trains them.

Shape letters: B batch, K classes, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.resize import resize
from saccade.layers.resnet import ResNetTrunk
from saccade.models.backbone import check_images, maps_of
from saccade.models.segmentation import Segmentation, Segmenter
from saccade.models.segmentation_losses import dice_loss
from saccade.models.structured_awareness_decoder.parts import ACFA, SMMM, TFFA, Activation, GateOf, MaskAxis


class StructuredAwarenessDecoder(nn.Module):
    """Maps from fine to coarse -> a map of each level, of the same channels and sizes.

        Y_n = TFFA(ACFA(F_n));   Y_i = TFFA(ACFA(SMMM(F_i, up(Y_{i+1}))))         up: bilinear, then a 1 x 1 convolution

    Args:
        channels: of the maps, fine to coarse; multiples of 4.
        sizes: of the maps for which guidance and spectral filters are made, (height, width) each.
        acfa, tffa, smmm: False leaves a part out; without SMMM, maps are added. Without all it is the paper's baseline.
        reduction, kernel_size, sequential, residual: see `ACFA`.
        gate: see `TFFA`.
        act, mask_axis: see `SMMM`.

    Raises:
        ValueError: if an argument is out of range, or the maps do not fit.
    """

    def __init__(
        self,
        channels: Sequence[int] = (64, 128, 320, 512),
        sizes: Sequence[tuple[int, int]] = ((56, 56), (28, 28), (14, 14), (7, 7)),
        *,
        acfa: bool = True,
        tffa: bool = True,
        smmm: bool = True,
        reduction: int = 16,
        kernel_size: int = 7,
        sequential: bool = True,
        residual: bool = False,
        gate: GateOf = "branch",
        act: Activation = "silu",
        mask_axis: MaskAxis = "channel",
    ) -> None:
        super().__init__()
        if not channels or len(sizes) != len(channels):
            raise ValueError(f"there must be a size for each level's channels, got {len(sizes)} and {len(channels)}")
        self.channels = tuple(channels)
        self.up = nn.ModuleList(nn.Conv2d(i, o, 1) for o, i in zip(channels, channels[1:]))
        self.skip = nn.ModuleList(SMMM(c, act=act, mask_axis=mask_axis) for c in channels[:-1]) if smmm else None
        self.blocks = nn.ModuleList()
        for c, size in zip(channels, sizes):
            block = nn.Sequential()
            if acfa:
                block.append(
                    ACFA(
                        c, *size, reduction=reduction, kernel_size=kernel_size, sequential=sequential, residual=residual
                    )
                )
            if tffa:
                block.append(TFFA(c, *size, gate=gate))
            self.blocks.append(block)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        shapes = [tuple(x.shape[1:2]) for x in maps]
        if shapes != [(c,) for c in self.channels]:
            raise ValueError(f"maps must have {self.channels} channels, got {tuple(c for (c,) in shapes)}")
        found = [self.blocks[-1](maps[-1])]
        for i in range(len(maps) - 2, -1, -1):
            coarse = self.up[i](resize(found[0], maps[i]))
            joined = maps[i] + coarse if self.skip is None else self.skip[i](maps[i], coarse)
            found.insert(0, self.blocks[i](joined))
        return found


class StructuredAwarenessNetwork(Segmenter):
    """Segmentation by an encoder of any kind and the structured-awareness decoder, with a head on each level.

    Args:
        num_classes: K.
        backbone: images -> maps from fine to coarse: a module that gives a list, a `saccade.models.backbone.Backbone`,
            or a backbone of transformers, such as its PvtV2Backbone, the paper's; None is a ResNet-18.
        channels: of its maps; where None, what its attribute `channels` says.
        image_size: for which guidance and spectral filters are made, in maps at 1/4, 1/8, 1/16 ...
        width: of the ResNet-18, where there is no backbone.
        sum_heads: the logits are the sum of all levels', not the finest one's.
        in_channels: of the images.
        acfa, tffa, smmm, reduction, kernel_size, sequential, residual, gate, act, mask_axis: see
            `StructuredAwarenessDecoder`.

    Raises:
        ValueError: if an argument is out of range or the backbone does not say its channels.
    """

    slug = "structured-awareness-decoder"

    def __init__(
        self,
        num_classes: int = 9,
        *,
        backbone: nn.Module | None = None,
        channels: Sequence[int] | None = None,
        image_size: int = 224,
        width: int = 64,
        sum_heads: bool = False,
        in_channels: int = 3,
        acfa: bool = True,
        tffa: bool = True,
        smmm: bool = True,
        reduction: int = 16,
        kernel_size: int = 7,
        sequential: bool = True,
        residual: bool = False,
        gate: GateOf = "branch",
        act: Activation = "silu",
        mask_axis: MaskAxis = "channel",
    ) -> None:
        super().__init__()
        if min(num_classes, image_size) < 1:
            raise ValueError(f"num_classes and image_size must be positive, got {num_classes} and {image_size}")
        self.in_channels, self.sum_heads = in_channels, sum_heads
        self.backbone = ResNetTrunk(18, width=width, in_channels=in_channels) if backbone is None else backbone
        found = getattr(self.backbone, "channels", None) if channels is None else channels
        if not found:
            raise ValueError("channels must be given for a backbone that has no attribute of that name")
        sides = [max(1, image_size // (4 << i)) for i in range(len(found))]
        self.decoder = StructuredAwarenessDecoder(
            found, [(side, side) for side in sides], acfa=acfa, tffa=tffa, smmm=smmm, reduction=reduction,
            kernel_size=kernel_size, sequential=sequential, residual=residual, gate=gate, act=act, mask_axis=mask_axis,
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Conv2d(c, num_classes, 1) for c in found)

    def forward(self, pixel_values: Tensor) -> Segmentation:
        """Images (B, C, H, W) of any size that the backbone takes; in training with the logits of all `heads`.

        Raises:
            ValueError: if they are no batch of images, or the backbone's maps have other channels.
        """
        check_images(pixel_values, self.in_channels)
        maps = self.decoder(maps_of(self.backbone(pixel_values)))
        used = list(zip(self.heads, maps)) if self.training or self.sum_heads else [(self.heads[0], maps[0])]
        heads = [resize(head(x), pixel_values) for head, x in used]
        logits = torch.stack(heads).sum(0) if self.sum_heads else heads[0]
        return Segmentation(logits, heads=heads if self.training else None)


def segmentation_loss(output: Segmentation, labels_BHW: Tensor) -> Tensor:
    """Cross entropy + Dice, the mean over the heads of all levels.

    Args:
        output: of the network in training mode.
        labels_BHW: a class for each pixel.

    Raises:
        ValueError: if the output is not from training mode.
    """
    if output.heads is None:
        raise ValueError("the loss needs the output of a network in training mode")
    each = [F.cross_entropy(logits, labels_BHW) + dice_loss(logits, labels_BHW) for logits in output.heads]
    return torch.stack(each).mean()
