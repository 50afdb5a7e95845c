"""The trunk of a residual network: a stem and stages of residual blocks, the maps of all stages (He et al., arXiv
1512.03385).

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from saccade.catalogue.names import Names
from saccade.layers.convolution import conv_norm_relu
from saccade.layers.residual import BasicBlock, Bottleneck

#: depth in layers -> blocks of the stages, and whether they are bottlenecks
DEPTHS: Mapping[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
#: torchvision's names of parameters -> ours; its classifier has no place here
TORCHVISION = Names(
    {
        "conv1.{leaf}": "stem.0.{leaf}",
        "bn1.{leaf}": "stem.1.{leaf}",
        "fc.{leaf}": None,
        **{
            f"layer{i + 1}.{{j}}.{theirs}.{{leaf}}": f"stages.{i}.{{j}}.{ours}.{{leaf}}"
            for i in range(4)
            for theirs, ours in (
                *((f"conv{k}", f"conv{k}") for k in (1, 2, 3)),
                *((f"bn{k}", f"norm{k}") for k in (1, 2, 3)),
                ("downsample.0", "shortcut.0"),
                ("downsample.1", "shortcut.1"),
            )
        },
    }
)


class ResNetTrunk(nn.Module):
    """Images (B, 3, H, W) of any size -> a map of each stage, from fine to coarse.

    Args:
        depth: of `DEPTHS`.
        width: channels of the stem.
        in_channels: of the images.
        stages: how many of the four.
        last_stride: of the fourth stage; 1 keeps the third's resolution, as re-identification does.

    Attributes:
        channels, strides: of the maps.

    Raises:
        ValueError: if the depth is not offered, or a number is out of range.
    """

    def __init__(
        self, depth: int = 50, *, width: int = 64, in_channels: int = 3, stages: int = 4, last_stride: int = 2
    ) -> None:
        super().__init__()
        if depth not in DEPTHS:
            raise ValueError(f"depth must be one of {', '.join(map(str, DEPTHS))}, got {depth}")
        if last_stride not in (1, 2):
            raise ValueError(f"last_stride must be 1 or 2, got {last_stride}")
        if width < 1 or in_channels < 1 or not 1 <= stages <= 4:
            raise ValueError(
                "width and in_channels must be positive and stages from 1 to 4, got "
                f"{width}, {in_channels} and {stages}"
            )
        counts, bottleneck = DEPTHS[depth]
        self.in_channels = in_channels
        self.stem = conv_norm_relu(in_channels, width, 7, 2)
        self.pool = nn.MaxPool2d(3, 2, padding=1)
        self.stages, channels = nn.ModuleList(), width
        for i, count in enumerate(counts[:stages]):
            blocks = nn.Sequential()
            for j in range(count):
                stride = (last_stride if i == 3 else 2) if i and not j else 1
                block = (Bottleneck if bottleneck else BasicBlock)(channels, width << i, stride)
                channels = (width << i) * (Bottleneck.expansion if bottleneck else 1)
                blocks.append(block)
            self.stages.append(blocks)
        expansion = Bottleneck.expansion if bottleneck else 1
        self.channels = tuple((width << i) * expansion for i in range(stages))
        self.strides = (4, 8, 16, 16 * last_stride)[:stages]

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        x_BCHW, maps = self.pool(self.stem(x_BCHW)), []
        for stage in self.stages:
            x_BCHW = stage(x_BCHW)
            maps.append(x_BCHW)
        return maps
