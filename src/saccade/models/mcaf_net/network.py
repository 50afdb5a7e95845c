"""MCAF-Net: a U of multi-branch blocks, with colour attention and attention to both skips on the way up.

Shape letters: B batch, C channels, H height, W width of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.backbone import check_images
from saccade.models.mcaf_net.block import MultiBranchBlock
from saccade.models.mcaf_net.colour import ColourAttention
from saccade.models.mcaf_net.fusion import AttentionFusion
from saccade.models.restoration import Restorer, SuperResolved

#: the network's stride
_STRIDE = 4


class MCAFNet(Restorer):
    """The dehazing network: J = K I - B + I, with K (1 channel) and B (3) from the last map.

    In training the output also has the images and anchors of both colour attentions (`MCAFNet.colour`).

    Args:
        widths: channels of the five stages: encoder, encoder, bottleneck, decoder, decoder; multiples of 4.
        depths: their blocks.
        num_heads: of the fusions.
        key_stride: of the fusions, see `AttentionFusion`; 1 as published.
        colour_attention: False leaves the colour attentions out.
        colour_heads: False leaves out what they give beside features, for networks that are trained no more.

    Raises:
        ValueError: if there are not five widths and depths, or a number is out of range.
    """

    slug = "mcaf-net"
    authors_module = "model"

    def __init__(
        self,
        widths: Sequence[int] = (24, 48, 96, 48, 24),
        depths: Sequence[int] = (8, 8, 16, 8, 8),
        *,
        num_heads: int = 4,
        key_stride: int = 1,
        colour_attention: bool = True,
        colour_heads: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) != 5 or len(depths) != 5 or min(depths) < 0:
            raise ValueError(f"widths and depths must be five each, got {tuple(widths)} and {tuple(depths)}")
        first, second, third, fourth, last = widths
        self.embed = _reflecting(3, first)
        self.down = nn.ModuleList([_reflecting(first, second, stride=2), _reflecting(second, third, stride=2)])
        self.up = nn.ModuleList([nn.Conv2d(third, 4 * fourth, 1), nn.Conv2d(fourth, 4 * last, 1)])
        self.stages = nn.ModuleList(
            nn.Sequential(*(MultiBranchBlock(width) for _ in range(depth))) for width, depth in zip(widths, depths)
        )
        self.colour = nn.ModuleList(
            [ColourAttention(fourth, 2, heads=colour_heads), ColourAttention(last, 1, heads=colour_heads)]
            if colour_attention
            else []
        )
        self.fuse = nn.ModuleList(
            AttentionFusion(width, num_heads=num_heads, key_stride=key_stride) for width in (fourth, last)
        )
        self.head = _reflecting(last, 4)

    def forward(self, pixel_values: Tensor) -> SuperResolved:
        """Images (B, 3, H, W) of at least 4 x 4 pixels, in [0, 1].

        Raises:
            ValueError: if they are no batch of colour images, or smaller.
        """
        check_images(pixel_values, 3)
        H, W = pixel_values.shape[2:]
        if min(H, W) < _STRIDE:
            raise ValueError(f"images must be at least {_STRIDE} x {_STRIDE} pixels, got {H} x {W}")
        image_B3HW = F.pad(pixel_values, (0, -W % _STRIDE, 0, -H % _STRIDE), mode="reflect")
        skips = [self.stages[0](self.embed(image_B3HW))]
        skips.append(self.stages[1](self.down[0](skips[0])))
        x_BCHW = self.stages[2](self.down[1](skips[1]))
        images, anchors = [], []
        for level in (0, 1):
            x_BCHW = F.pixel_shuffle(self.up[level](x_BCHW), 2)
            if self.colour:
                x_BCHW, image, anchor = self.colour[level](x_BCHW, heads=self.training)
                if image is not None and anchor is not None:
                    images.append(image[..., :H, :W])
                    anchors.append(anchor[..., :H, :W])
            x_BCHW = self.stages[3 + level](self.fuse[level](x_BCHW, *skips) + x_BCHW)
        factor, shift = self.head(x_BCHW).split([1, 3], 1)
        clear_B3HW = factor * image_B3HW - shift + image_B3HW
        return SuperResolved(clear_B3HW[..., :H, :W], inner_images=images or None, inner_embeddings=anchors or None)


def _reflecting(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, padding_mode="reflect")
