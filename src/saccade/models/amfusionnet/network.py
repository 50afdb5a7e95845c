"""AMFusionNet: the block of parallel attentions, the encoder of three kernels, the decoder, and a rule between both.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade import catalogue
from saccade.catalogue.authors import load_state, read_checkpoint
from saccade.layers.mlp import MLP
from saccade.layers.resize import resize
from saccade.models.amfusionnet.rules import RULES, l1_rule
from saccade.models.fusion import Fused, Fuser, check_pair
from saccade.ops.feature_maps import check_map
from saccade.ops.statistics import channel_gate

if TYPE_CHECKING:
    from typing_extensions import Self


class ParallelAttention(nn.Module):
    """[M_s F; M_c F] + PReLU(conv1x1(F)), then a sigmoid: 2 C channels of C.

    Args:
        channels: C.
        reduction: the channel MLP is C // reduction wide.
        kernel_size: of the spatial convolution, odd.
        spatial_mean: what the second of the spatial branch's two maps is the mean over channels of: the "input" image,
            as the authors have it, or the "features" F.
        squashed: the sigmoid at the end.

    Raises:
        ValueError: if a number is out of range or `spatial_mean` unknown.
    """

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 16,
        kernel_size: int = 7,
        spatial_mean: Literal["input", "features"] = "input",
        squashed: bool = True,
    ) -> None:
        super().__init__()
        if not 1 <= reduction <= channels:
            raise ValueError(f"reduction must be between 1 and the number of channels ({channels}), got {reduction}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if spatial_mean not in ("input", "features"):
            raise ValueError(f"spatial_mean must be 'input' or 'features', got {spatial_mean!r}")
        self.channels, self.spatial_mean, self.squashed = channels, spatial_mean, squashed
        self.mlp = MLP(channels, channels // reduction, activation="relu")
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)
        self.norm = nn.BatchNorm2d(1)
        self.shortcut = nn.Sequential(nn.Conv2d(channels, 2 * channels, 1), nn.PReLU())

    def channel_gate(self, f_BCHW: Tensor) -> Tensor:
        """M_c, (B, C, 1, 1): a sigmoid of two sigmoids' sum, so between 0.5 and 0.881."""
        return channel_gate(f_BCHW, lambda pooled: self.mlp(pooled).sigmoid(), ("avg", "max"))

    def spatial_gate(self, f_BCHW: Tensor, image_BCHW: Tensor) -> Tensor:
        """M_s, (B, 1, H, W): a sigmoid of a GELU, so above 0.457."""
        source = image_BCHW if self.spatial_mean == "input" else f_BCHW
        maps = torch.cat([f_BCHW.amax(1, keepdim=True), source.mean(1, keepdim=True)], 1)
        return F.gelu(self.norm(self.conv(maps))).sigmoid()

    def forward(self, f_BCHW: Tensor, image_BCHW: Tensor) -> Tensor:
        """
        Args:
            f_BCHW: F.
            image_BCHW: what F was made of, of the same height and width and any number of channels.

        Raises:
            ValueError: if they have other shapes.
        """
        check_map(f_BCHW, self.channels)
        if image_BCHW.shape[:1] + image_BCHW.shape[2:] != f_BCHW.shape[:1] + f_BCHW.shape[2:]:
            raise ValueError(f"image must go with maps {tuple(f_BCHW.shape)}, got {tuple(image_BCHW.shape)}")
        spatial, channel = self.spatial_gate(f_BCHW, image_BCHW), self.channel_gate(f_BCHW)
        y_BCHW = torch.cat([spatial * f_BCHW, channel * f_BCHW], 1) + self.shortcut(f_BCHW)
        return y_BCHW.sigmoid() if self.squashed else y_BCHW


class Encoder(nn.Module):
    """A grey image (B, 1, H, W) -> maps (B, 6 w, H, W), w the last width; of any size that the kernels leave some of.

    Args:
        widths: of each kernel, level by level.
        stem: channels of the first convolution.
        kernels: sizes, odd, small to large.
        reduction, spatial_mean: see `ParallelAttention`.
        same_padding: convolutions keep the size; False pads all of them by 1, as the authors do, and resizes what
            comes out smaller.
        old: the authors' older variant, without the stem's shortcut, the norm and the last sigmoid.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128),
        *,
        stem: int = 16,
        kernels: Sequence[int] = (3, 5, 7),
        reduction: int = 16,
        spatial_mean: Literal["input", "features"] = "input",
        same_padding: bool = False,
        old: bool = False,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1 or stem < 1:
            raise ValueError(f"widths and stem must be positive, got {tuple(widths)} and {stem}")
        if not kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"kernels must be odd, got {tuple(kernels)}")
        inputs = [stem, *(len(kernels) * width for width in widths)]
        self.stem = nn.Conv2d(1, stem, 3, padding=1)
        self.levels = nn.ModuleList(
            nn.ModuleDict({str(k): nn.Conv2d(i, width, k, padding=k // 2 if same_padding else 1) for k in kernels})
            for i, width in zip(inputs, widths)
        )
        self.shortcut = None if old else nn.Conv2d(stem, inputs[-1], 1)
        self.norm = None if old else nn.BatchNorm2d(inputs[-1])
        self.attention = ParallelAttention(inputs[-1], reduction=reduction, spatial_mean=spatial_mean, squashed=not old)
        #: the side of the smallest image
        self.least = 1 if same_padding else max(1, max(kernels) - 2)

    def forward(self, x_B1HW: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if `x` is no batch of grey images, or these are too small.
        """
        check_map(x_B1HW, 1)
        if min(x_B1HW.shape[2:]) < self.least:
            raise ValueError(f"height and width must be at least {self.least}, got {tuple(x_B1HW.shape[2:])}")
        f_BCHW = first = F.relu(self.stem(x_B1HW))
        for number, level in enumerate(self.levels, 1):
            assert isinstance(level, nn.ModuleDict)
            maps = [_kept_size(conv, f_BCHW) for conv in level.values()]
            f_BCHW = torch.cat(maps if number < len(self.levels) else maps[::-1], 1)  # the last: large kernels first
        if self.shortcut is not None and self.norm is not None:
            f_BCHW = self.norm(F.relu(f_BCHW + F.relu(self.shortcut(first))))
        return self.attention(f_BCHW, x_B1HW)


def _kept_size(conv: nn.Module, x_BCHW: Tensor) -> Tensor:
    """ReLU(conv(x)), back at the size of x where the kernel is larger than the padding allows for."""
    assert isinstance(conv, nn.Conv2d)
    y_BCHW = F.relu(conv(x_BCHW))
    same = conv.kernel_size[0] == 2 * int(conv.padding[0]) + 1
    return y_BCHW if same else resize(y_BCHW, x_BCHW, align_corners=True)


class Decoder(nn.Module):
    """Maps -> a grey image in (-1, 1): convolution, norm and PReLU for each width but the last, which ends in a tanh.

    Args:
        widths: from the maps' channels to 1.
        old: the authors' older variant: LeakyReLU of slope 0.01 everywhere, also at the end.

    Raises:
        ValueError: if there are fewer than two widths, or one is not positive.
    """

    def __init__(self, widths: Sequence[int] = (768, 384, 192, 96, 48, 1), *, old: bool = False) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths must be two positive numbers or more, got {tuple(widths)}")
        steps = list(pairwise(widths))
        self.channels, self.old = widths[0], old
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.LeakyReLU(0.01) if old else nn.PReLU())
            for i, o in steps[:-1]
        )
        self.last = nn.Conv2d(*steps[-1], 3, padding=1)

    def forward(self, f_BCHW: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if the maps have other channels.
        """
        check_map(f_BCHW, self.channels)
        for block in self.blocks:
            f_BCHW = block(f_BCHW)
        y_B1HW = self.last(f_BCHW)
        return F.leaky_relu(y_B1HW, 0.01) if self.old else y_B1HW.tanh()


class AMFusionNet(Fuser):
    """The auto-encoder, with a rule between its halves.

    Args:
        widths, stem, kernels, reduction, spatial_mean, same_padding: see `Encoder`.
        rule: of `RULES`.
        window: of the l1 rule.
        old: the authors' older variant of encoder and decoder.

    Raises:
        ValueError: if a number is out of range or a name unknown.
    """

    slug = "amfusionnet"
    authors_module = "encoder"

    def __init__(
        self,
        widths: Sequence[int] = (32, 64, 128),
        *,
        stem: int = 16,
        kernels: Sequence[int] = (3, 5, 7),
        reduction: int = 16,
        spatial_mean: Literal["input", "features"] = "input",
        same_padding: bool = False,
        rule: str = "l1",
        window: int = 3,
        old: bool = False,
    ) -> None:
        super().__init__()
        if rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {rule!r}")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"window must be odd, got {window}")
        self.rule, self.window = rule, window
        self.encoder = Encoder(
            widths,
            stem=stem,
            kernels=kernels,
            reduction=reduction,
            spatial_mean=spatial_mean,
            same_padding=same_padding,
            old=old,
        )
        channels = 2 * len(kernels) * widths[-1]
        shares = (1, 2, 4) if old else (1, 2, 4, 8, 16)
        self.decoder = Decoder([*(max(1, channels // share) for share in shares), 1], old=old)

    def load_halves(self, encoder: str | Path, decoder: str | Path) -> Self:
        """Take the authors' weights, which come as two state dicts.

        Raises:
            OSError: if a file cannot be read.
            ValueError: if it does not fit.
        """
        for name, path in (("encoder", encoder), ("decoder", decoder)):
            state = read_checkpoint(path)
            try:
                load_state(self.get_submodule(name), catalogue.port(self.slug, name).convert(state))
            except ValueError as error:
                raise ValueError(f"{path} does not fit the {name}: {error}") from error
        return self

    def fuse(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """The rule on two maps of the encoder."""
        return l1_rule(a_BCHW, b_BCHW, window=self.window) if self.rule == "l1" else RULES[self.rule](a_BCHW, b_BCHW)

    def reconstruct(self, x_B1HW: Tensor) -> Tensor:
        """One image through both halves: what is learned."""
        return self.decoder(self.encoder(x_B1HW))

    def forward(self, infrared: Tensor, visible: Tensor) -> Fused:
        """Grey images (B, 1, H, W) in [0, 1].

        Raises:
            ValueError: if they are no grey images, of one shape, with a side of at least `encoder.least` pixels.
        """
        check_pair(infrared, visible, self.encoder.least)
        return Fused(self.decoder(self.fuse(self.encoder(infrared), self.encoder(visible))))
