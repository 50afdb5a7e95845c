"""HAN: attention among layers, the gate over channels and space, the residual groups, and the network of them.

Shape letters: B batch, L layers, C channels, H height, W width, s scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.backbone import check_images
from saccade.models.restoration import Restorer, SuperResolved

#: DIV2K's mean colour, as a share of the range
MEAN = (0.4488, 0.4371, 0.4040)


def layer_attention(x_BLCHW: Tensor, *, invert: bool = True) -> Tensor:
    """LAM's weights (B, L, L), rows sum to 1: softmax of rowmax(E) - E, or of E, with E = X X^T over all values.

    Energies are sums over C H W products, so they are taken in float32 at least.

    Args:
        x_BLCHW: the maps of all layers.
        invert: rowmax(E) - E, so that the least similar layer weighs most; False: E.
    """
    rows = x_BLCHW.flatten(2)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    energy_BLL = rows @ rows.mT
    if invert:
        energy_BLL = energy_BLL.amax(-1, keepdim=True) - energy_BLL
    return energy_BLL.softmax(-1).to(x_BLCHW.dtype)


class LayerAttention(nn.Module):
    """LAM: each layer's map plus gamma times a mixture of all layers' maps.

    Args:
        invert: see `layer_attention`.
    """

    def __init__(self, invert: bool = True) -> None:
        super().__init__()
        self.invert = invert
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x_BLCHW: Tensor) -> Tensor:
        """(B, L, C, H, W) -> (B, L C, H, W)."""
        mixed = layer_attention(x_BLCHW, invert=self.invert) @ x_BLCHW.flatten(2)
        return (self.gamma * mixed.view_as(x_BLCHW) + x_BLCHW).flatten(1, 2)


class ChannelSpatialAttention(nn.Module):
    """CSAM: x (1 + gamma sigmoid(conv3d(x))), one kernel over channel, height and width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """sigmoid(conv3d(x)), (B, C, H, W)."""
        return self.conv(x_BCHW[:, None])[:, 0].sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + x_BCHW * (self.gamma * self.gate(x_BCHW))


class ChannelBlock(nn.Module):
    """RCAB: two convolutions, a gate per channel from the global mean, and the input.

    Args:
        channels: C.
        reduction: the gate's hidden layer has C // reduction channels.
    """

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(channels, channels), _conv(channels, channels)
        self.down, self.up = (
            nn.Conv2d(channels, channels // reduction, 1),
            nn.Conv2d(channels // reduction, channels, 1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y_BCHW = self.conv2(F.relu(self.conv1(x_BCHW)))
        gate = self.up(F.relu(self.down(y_BCHW.mean((2, 3), keepdim=True)))).sigmoid()
        return x_BCHW + y_BCHW * gate


class ResidualGroup(nn.Module):
    """RG: blocks, a convolution, and the group's input.

    Args:
        channels, reduction: of the blocks, see `ChannelBlock`.
        blocks: how many.
    """

    def __init__(self, channels: int, reduction: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(ChannelBlock(channels, reduction) for _ in range(blocks)))
        self.conv = _conv(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW + self.conv(self.blocks(x_BCHW))


class HAN(Restorer):
    """The holistic attention network.

    Args:
        scale: s, a power of two or 3.
        groups: G residual groups.
        blocks: in each.
        channels: C.
        reduction: of the channel gate, a divisor of C.
        value_range: the largest value of a pixel: 255, or 1.
        layer_attention, channel_spatial: False leaves LAM, or CSAM, out (without both it is RCAN's trunk).
        invert: LAM's sign, see `layer_attention`.

    Raises:
        ValueError: if the scale is not offered, or a number is out of range.
    """

    slug = "han"
    authors_module = "han"
    mean: Tensor

    def __init__(
        self,
        scale: int = 2,
        *,
        groups: int = 10,
        blocks: int = 20,
        channels: int = 64,
        reduction: int = 16,
        value_range: float = 255.0,
        layer_attention: bool = True,
        channel_spatial: bool = True,
        invert: bool = True,
    ) -> None:
        super().__init__()
        if scale != 3 and (scale < 1 or scale & (scale - 1)):
            raise ValueError(f"scale must be 3 or a power of two, got {scale}")
        if min(groups, blocks, channels, reduction) < 1 or channels < reduction:
            raise ValueError(
                f"groups, blocks and channels must be positive and reduction at most channels, got {groups}, {blocks}, "
                f"{channels} and {reduction}"
            )
        self.scale, self.value_range = scale, value_range
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None] * value_range)
        self.head = _conv(3, channels)
        self.groups = nn.ModuleList(ResidualGroup(channels, reduction, blocks) for _ in range(groups))
        self.body_conv = _conv(channels, channels)
        self.layer_attention = LayerAttention(invert) if layer_attention else None
        self.layer_conv = _conv((groups + 1) * channels, channels) if layer_attention else None
        self.channel_spatial = ChannelSpatialAttention() if channel_spatial else None
        self.fuse = _conv(2 * channels, channels) if layer_attention else None
        steps = [3] if scale == 3 else [2] * (scale.bit_length() - 1)
        self.upsample = nn.Sequential(
            *(layer for s in steps for layer in (_conv(channels, s * s * channels), nn.PixelShuffle(s)))
        )
        self.tail = _conv(channels, 3)

    def forward(self, pixel_values: Tensor) -> SuperResolved:
        """Images (B, 3, H, W) in [0, value_range].

        Raises:
            ValueError: if they are no batch of colour images.
        """
        check_images(pixel_values, 3)
        first = y_BCHW = self.head(pixel_values - self.mean)
        maps = []
        for group in self.groups:
            y_BCHW = group(y_BCHW)
            maps.append(y_BCHW)
        y_BCHW = self.body_conv(y_BCHW)
        gated = y_BCHW if self.channel_spatial is None else self.channel_spatial(y_BCHW)
        if self.layer_attention is not None and self.layer_conv is not None and self.fuse is not None:
            stacked_BLCHW = torch.stack([y_BCHW, *maps[::-1]], 1)  # the latest first, as the authors stack them
            gated = self.fuse(torch.cat([gated, self.layer_conv(self.layer_attention(stacked_BLCHW))], 1))
        return SuperResolved(self.tail(self.upsample(gated + first)) + self.mean)


def self_ensemble(model: HAN, x_BCHW: Tensor) -> Tensor:
    """The mean over eight flips and rotations, turned back: the paper's HAN+.

    Args:
        model: in evaluation mode.
        x_BCHW: images, as the model takes them.
    """
    images = []
    for turns in range(4):
        for flip in (False, True):
            turned = x_BCHW.rot90(turns, (2, 3))
            out = model(turned.flip(3) if flip else turned).image
            images.append((out.flip(3) if flip else out).rot90(-turns, (2, 3)))
    return torch.stack(images).mean(0)


def psnr(image_BCHW: Tensor, truth_BCHW: Tensor, *, value_range: float = 1.0, border: int = 0) -> Tensor:
    """Peak signal to noise ratio in dB, on the luma of ITU-R BT.601 of colour images, `border` pixels cut off.

    Args:
        image_BCHW, truth_BCHW: colour images, C = 3.
        value_range: the largest value of a pixel.
        border: pixels that do not count, on each side.
    """
    weight = torch.tensor([65.481, 128.553, 24.966], device=image_BCHW.device) / 255
    off = ((image_BCHW - truth_BCHW) * weight[:, None, None]).sum(1)
    off = off[:, border : off.shape[1] - border, border : off.shape[2] - border]
    return 10 * (value_range**2 / off.square().mean((1, 2)).clamp(min=1e-12)).log10()


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)
