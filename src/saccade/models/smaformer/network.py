"""SMAFormer: a U of residual convolutions and blocks, and the loss that trains it.

Shape letters: B batch, K classes, C channels, N tokens, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.backbone import check_images
from saccade.models.segmentation import Segmentation, Segmenter
from saccade.models.segmentation_losses import dice_loss
from saccade.models.smaformer.modulator import Over, PatchEmbedding, SMAFormerBlock, to_map, to_tokens

#: the input's side over that of the coarsest map
STRIDE = 32


class ResidualConv(nn.Module):
    """[BN, ReLU, 3 x 3 of stride 2, BN, ReLU, 3 x 3](x) + [3 x 3 of stride 2, BN](x): a map at half its size.

    Args:
        in_channels, channels: of the maps.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(in_channels), nn.ReLU(), nn.Conv2d(in_channels, channels, 3, 2, padding=1),
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1),
        )  # fmt: skip
        self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 3, 2, padding=1), nn.BatchNorm2d(channels))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.branch(x_BCHW) + self.shortcut(x_BCHW)


class SMAFormer(Segmenter):
    """Segmentation by a U of convolutions and synergistic attention.

    Args:
        num_classes: K.
        filters: f0 to f5, widths from the image to the bottom; f5 = 2 f4.
        num_heads: a divisor of f1, f2, f3 and f5.
        layers: blocks of each stage.
        expansion: of the blocks' MLPs.
        dropout: of the blocks; the decoder's second stage has none.
        reduction, rates: of the modulators.
        fusion_gate: False leaves the modulators out: plain attention.
        over: of the attention, see `SynergisticAttention`.
        scrambled: three maps of tokens are made without transposition, as the authors' code makes them.
        in_channels: of the images.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "smaformer"

    def __init__(
        self,
        num_classes: int = 9,
        *,
        filters: Sequence[int] = (16, 32, 64, 128, 256, 512),
        num_heads: int = 8,
        layers: int = 1,
        expansion: int = 2,
        dropout: float = 0.1,
        reduction: int = 16,
        rates: Sequence[int] = (1, 6, 12, 18),
        fusion_gate: bool = True,
        over: Over = "tokens",
        scrambled: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(filters) != 6 or min(num_classes, layers, in_channels, *filters) < 1:
            raise ValueError(
                "num_classes, layers, in_channels and six filters must be positive, got "
                f"{num_classes}, {layers}, {in_channels} and {tuple(filters)}"
            )
        if filters[5] != 2 * filters[4]:
            raise ValueError(f"the last of the filters must be twice the one before, got {tuple(filters)}")
        f0, f1, f2, f3, f4, f5 = filters
        self.in_channels, self.scrambled = in_channels, scrambled
        options: dict[str, Any] = {
            "expansion": expansion,
            "over": over,
            "fusion_gate": fusion_gate,
            "reduction": reduction,
            "rates": rates,
        }

        def stage(dim: int, drop: float = dropout) -> nn.ModuleList:
            return nn.ModuleList(SMAFormerBlock(dim, num_heads, dropout=drop, **options) for _ in range(layers))

        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, f0, 3, padding=1), nn.BatchNorm2d(f0), nn.ReLU(), nn.Conv2d(f0, f0, 3, padding=1)
        )
        self.stem_shortcut = nn.Conv2d(in_channels, f0, 3, padding=1)
        self.embed = nn.ModuleList([PatchEmbedding(f0, f1), PatchEmbedding(f2, f3), PatchEmbedding(f4, f5)])
        self.encoder = nn.ModuleList(map(stage, (f1, f3, f5, f5)))
        self.down = nn.ModuleList([ResidualConv(f1, f2), ResidualConv(f3, f4)])
        self.decoder = nn.ModuleList([stage(f5), stage(f5, 0.0), stage(f3), stage(f2)])
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, k, k)
            for i, o, k in ((f5, f4, 2), (f5, f4, 2), (f4 + f3, f3, 1), (f3, f2, 2), (2 * f2, f2, 2), (f2, f1, 2))
        )
        self.adjust = nn.ConvTranspose2d(f1, f2, 1)
        self.head = nn.Sequential(nn.Conv2d(f1, f0, 1), nn.Conv2d(f0, num_classes, 1))

    def forward(self, pixel_values: Tensor) -> Segmentation:
        """Images of any size: they are filled up with zeros to a square whose side is a multiple of 32.

        Raises:
            ValueError: if they are no batch of images.
        """
        check_images(pixel_values, self.in_channels)
        height, width = pixel_values.shape[2:]
        side = -(-max(height, width) // STRIDE) * STRIDE
        square = F.pad(pixel_values, (0, side - width, 0, side - height))
        return Segmentation(self.logits(square)[..., :height, :width])

    def logits(self, x_BCHW: Tensor) -> Tensor:
        """(B, K, H, W) of square images whose side is a multiple of 32."""
        first = self.stem(x_BCHW) + self.stem_shortcut(x_BCHW)
        tokens1 = _through(self.encoder[0], self.embed[0](first))
        second = self.down[0](to_map(tokens1, scrambled=self.scrambled))
        tokens2 = _through(self.encoder[1], self.embed[1](second))
        map2 = to_map(tokens2, scrambled=self.scrambled)
        third = self.down[1](map2)
        tokens3 = _through(self.encoder[2], self.embed[2](third))
        tokens4 = _through(self.encoder[3], tokens3)

        x = self.up[0](to_map(_through(self.decoder[0], tokens4)))
        map3 = F.interpolate(to_map(tokens3, scrambled=self.scrambled), scale_factor=2, mode="bilinear")
        x = self._decoded(1, torch.cat([x, third], 1), to_tokens(map3))
        x = self.up[2](torch.cat([self.up[1](x), map2], 1))
        x = self.up[3](self._decoded(2, x, to_tokens(map2)))
        x = self.up[4](torch.cat([x, second], 1))
        x = self.up[5](self._decoded(3, x, to_tokens(self.adjust(to_map(tokens1)))))
        return self.head(x)

    def _decoded(self, number: int, x_BCHW: Tensor, skip_BNC: Tensor) -> Tensor:
        return to_map(_through(self.decoder[number], to_tokens(x_BCHW), skip_BNC))

    def as_released(self) -> None:
        """Attention runs over the batch, and three maps are made without transposition, as in the authors' code."""
        self.scrambled = True
        for module in self.modules():
            if isinstance(module, SMAFormerBlock):
                module.attention.over = "batch"


def segmentation_loss(output: Segmentation, labels_BHW: Tensor, weights: Sequence[float] | None = None) -> Tensor:
    """0.4 cross entropy + 0.6 Dice (its squared form, smoothed by 1e-5), as the authors' second version is trained.

    Args:
        output: of the network.
        labels_BHW: a class for each pixel.
        weights: of the classes in the Dice, heavier for small organs; all 1 where None.
    """
    cross_entropy = F.cross_entropy(output.logits, labels_BHW)
    return 0.4 * cross_entropy + 0.6 * dice_loss(output.logits, labels_BHW, smooth=1e-5, weights=weights)


def _through(stage: nn.Module, x_BNC: Tensor, source_BNC: Tensor | None = None) -> Tensor:
    assert isinstance(stage, nn.ModuleList)
    for block in stage:
        x_BNC = block(x_BNC, source_BNC)
    return x_BNC
