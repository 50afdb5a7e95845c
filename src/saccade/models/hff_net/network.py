"""HFF-Net: two encoder-decoder branches of one form, for low and for high frequencies, that exchange their deep maps.

Shape letters: B batch, C channels, D depth, H height, W width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.residual import ResidualBlock
from saccade.layers.resize import resize
from saccade.models.hff_net.attention import (
    AdaptiveLaplacian,
    Draws,
    FrequencyCrossAttention,
    Noise,
    Reading,
    check_volume,
)
from saccade.models.hff_net.decomposition import decompose, read_volumes
from saccade.models.segmentation import Segmentation, Segmenter

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


class Block(ResidualBlock):
    """f(IN(conv(f(IN(conv(x))))) + shortcut), f = ReLU, IN without parameters; volumes keep their size.

    Args:
        in_channels, out_channels: where they differ, the shortcut is a 1 x 1 x 1 convolution with IN.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        shortcut = None if in_channels == out_channels else _conv_norm(in_channels, out_channels, 1)
        super().__init__(in_channels, out_channels, shortcut=shortcut)
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)

    def branch(self, x_BCDHW: Tensor) -> Tensor:
        return F.instance_norm(self.conv2(F.relu(F.instance_norm(self.conv1(x_BCDHW)))))


class Up(nn.Sequential):
    """To the size of another volume (trilinear, corners on corners), then convolution, IN, ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(*_conv_norm(in_channels, out_channels, bias=True), nn.ReLU())

    def forward(self, x_BCDHW: Tensor, like_BCDHW: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(resize(x_BCDHW, like_BCDHW, align_corners=True))


class Maps(NamedTuple):
    """What a branch's encoder gives: E1 to E3, and the deep maps of which three go to the other branch too."""

    e1: Tensor
    e2: Tensor
    e3: Tensor
    e4: Tensor
    e4_down: Tensor
    e4_attended: Tensor
    e5_up: Tensor
    e5_attended: Tensor


class Branch(nn.Module):
    """One encoder and decoder.

    Args:
        in_channels: of its volumes.
        num_classes, widths, side: see `HFFNet`.
        slices: D at 1/8 and 1/16.
        **attention: of both `FrequencyCrossAttention`.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        widths: Sequence[int],
        side: Sequence[int],
        slices: Sequence[int],
        **attention: Any,
    ) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = widths
        self.stem = nn.Sequential(*(nn.Conv3d(c, c1, 3, padding=1, bias=False) for c in (in_channels, c1)))
        self.block1 = Block(c1, c1)
        self.down2, self.block2 = _step(c1, c2, 2), Block(c2, c2)
        self.down3, self.block3 = _step(c2, c3, 2), Block(c3, c3)
        self.down4, self.block4 = _step(c3, c4, 2), Block(c4, c4)
        self.deep4, self.down4_deep, self.same4 = Block(c4, c4), _step(c4, c4, 2), _step(c4, c4, 1)
        self.attend4 = FrequencyCrossAttention(c4, slices[0], **attention)
        self.down5, self.block5, self.same5 = _step(c4, c5, 2), Block(c5, c5), _step(c5, c5, 1)
        self.up5 = Up(c5, c5)
        self.attend5 = FrequencyCrossAttention(c5, slices[1], **attention)

        self.mix5, self.mixed5 = nn.Sequential(*_conv_norm(2 * c5 + c4, c5, 1), nn.ReLU()), Block(c5, c5)
        self.mixed5_up = Up(c5, c4)
        self.mix4, self.mixed4 = nn.Sequential(*_conv_norm(2 * c4 + c5, c4, 1), nn.ReLU()), Block(c4, c4)
        self.join4, self.join4_up = Block(2 * c4, c4), Up(c4, c3)

        self.join3, self.join3_up = Block(2 * c3, c3), Up(c3, c2)
        self.join2, self.join2_up = Block(2 * c2, c2), Up(c2, c1)
        self.join1, self.head = Block(2 * c1, c1), nn.Conv3d(c1, num_classes, 1)
        sides = (c2, *side)
        self.side = nn.Sequential(
            *(layer for i, o in zip(sides, sides[1:]) for layer in (*_conv_norm(i, o, bias=True), nn.ReLU()))
        )

    def encode(self, x_BCDHW: Tensor, noise: Sequence[Noise | None]) -> Maps:
        e1 = self.block1(self.stem(x_BCDHW))
        e2 = self.block2(self.down2(e1))
        e3 = self.block3(self.down3(e2))
        e4 = self.block4(self.down4(e3))
        deep4 = self.deep4(e4)
        e4_attended = self.attend4(self.same4(deep4), noise[0])
        e5 = self.block5(self.down5(e4))
        e5_attended = self.attend5(self.same5(e5), noise[1])
        return Maps(e1, e2, e3, e4, self.down4_deep(deep4), e4_attended, self.up5(e5, e4), e5_attended)

    def decode(self, own: Maps, other: Maps) -> tuple[Tensor, Tensor]:
        """Logits, and those of the side output, at full size."""
        deep = torch.cat([own.e5_attended, other.e5_attended, other.e4_down], 1)
        m5 = self.mixed5_up(self.mixed5(self.mix5(deep)), own.e4)
        m4 = self.mixed4(self.mix4(torch.cat([own.e4_attended, other.e4_attended, other.e5_up], 1)))
        m = self.join4_up(self.join4(torch.cat([m4, m5], 1)), own.e3)
        d3 = self.join3_up(self.join3(torch.cat([own.e3, m], 1)), own.e2)
        d2 = self.join2_up(self.join2(torch.cat([own.e2, d3], 1)), own.e1)
        d1 = self.join1(torch.cat([own.e1, d2], 1))
        return self.head(d1), self.side(resize(d3, own.e1, align_corners=True))


class HFFNet(Segmenter):
    """Segmentation of volumes by their low and their high frequencies.

    Args:
        num_classes: K.
        low_channels, high_channels: of the two inputs: a low band of each sequence, and its four directions.
        depth: of the volumes, which fixes the slice attentions: depth / 8 and depth / 16, rounded up.
        widths: of five levels.
        side: of the side output's convolutions; the last is its number of classes.
        branch: whose logits `forward` gives: the better one in validation.
        reduction, rate, rank, uncertainty, reading, draws, reparameterised: see `FrequencyCrossAttention`.
        laplacian_start: False starts the adaptive convolution like all others, as the authors' code does.

    Raises:
        ValueError: if a number is out of range.
    """

    slug = "hff-net"

    def __init__(
        self,
        num_classes: int = 4,
        *,
        low_channels: int = 4,
        high_channels: int = 16,
        depth: int = 128,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        side: Sequence[int] = (16, 8, 4),
        branch: Literal["low", "high"] = "low",
        reduction: int = 16,
        rate: int = 4,
        rank: int = 5,
        uncertainty: bool = True,
        reading: Reading = "attention",
        draws: Draws = "training",
        reparameterised: bool = True,
        laplacian_start: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) != 5 or min(num_classes, low_channels, high_channels, depth, *widths, *side) < 1:
            raise ValueError(
                "num_classes, channels, depth, five widths and side widths must be positive, got "
                f"{num_classes}, {low_channels}, {high_channels}, {depth}, {tuple(widths)} and {tuple(side)}"
            )
        if branch not in ("low", "high"):
            raise ValueError(f"branch must be one of low, high, got {branch!r}")
        self.depth, self.kept = depth, branch
        self.low_channels, self.high_channels = low_channels, high_channels
        attention: dict[str, Any] = {
            "reduction": reduction,
            "rate": rate,
            "rank": rank,
            "uncertainty": uncertainty,
            "reading": reading,
            "draws": draws,
            "reparameterised": reparameterised,
        }
        slices = [-(-depth // 8), -(-depth // 16)]
        self.laplacian = AdaptiveLaplacian(high_channels)
        self.low = Branch(low_channels, num_classes, widths, side, slices, **attention)
        self.high = Branch(high_channels, num_classes, widths, side, slices, **attention)
        self.apply(_start)
        if not laplacian_start:
            nn.init.kaiming_normal_(self.laplacian.weight, mode="fan_out", nonlinearity="relu")

    def branches(self, low: Tensor, high: Tensor, noise: Sequence[Noise | None] = (None,) * 4) -> Outputs:
        """Logits (B, K, D, H, W) of both branches, and those of their side outputs, all at full size.

        Args:
            low, high: as `forward` takes them.
            noise: of the attentions of the low branch at 1/8 and 1/16, then of the high branch's, in the place of what
                would be drawn.

        Raises:
            ValueError: if the volumes do not fit the network or each other.
        """
        check_volume(low, self.low_channels, self.depth, "low")
        check_volume(high, self.high_channels, self.depth, "high")
        if low.shape[0] != high.shape[0] or low.shape[2:] != high.shape[2:]:
            raise ValueError(f"low and high must have one size, got {tuple(low.shape)} and {tuple(high.shape)}")
        if max(low.shape[2:]) <= 16:
            raise ValueError(f"volumes must have more than 16 voxels along an axis, got {tuple(low.shape[2:])}")
        low_maps = self.low.encode(low, noise[:2])
        high_maps = self.high.encode(self.laplacian(high), noise[2:])
        logits_low, side_low = self.low.decode(low_maps, high_maps)
        logits_high, side_high = self.high.decode(high_maps, low_maps)
        return logits_low, logits_high, side_low, side_high

    def forward(self, low: Tensor, high: Tensor) -> Segmentation:
        """Low bands (B, C_low, D, H, W) and directional bands (B, C_high, D, H, W); any H and W.

        In training the output has the four `heads` of `branches`, by which it is trained.

        Raises:
            ValueError: if the volumes do not fit the network or each other.
        """
        heads = self.branches(low, high)
        return Segmentation(heads[self.kept == "high"], heads=list(heads) if self.training else None)

    def as_released(self) -> None:
        """FDCA multiplies by the attended map, as the authors' code does; at evaluation it still draws nothing."""
        for module in self.modules():
            if isinstance(module, FrequencyCrossAttention):
                module.reading = "code"

    def predict(self, files: str | Path | Sequence[str | Path]) -> Segmentation:
        """Of one head: `.npy` files of axial slices (depth, height, width), or one (sequences, depth, height, width).

        Volumes of another depth are read in pieces, those that overlap averaged. The output's `images` are the middle
        slice of the first sequence.

        Args:
            files: of as many sequences as there are low bands, in the order in which the network was trained (FLAIR,
                T1, T1ce, T2).

        Raises:
            OSError: if a file cannot be read.
            ValueError: if they are no volumes of one size, or not as many as the network has bands.
        """
        paths = [files] if isinstance(files, (str, Path)) else list(files)
        volumes = [read_volumes(path) for path in paths]
        if len({tuple(volume.shape[1:]) for volume in volumes}) > 1:
            raise ValueError(f"volumes of one head must have one size, got {[tuple(v.shape[1:]) for v in volumes]}")
        found = sum(len(volume) for volume in volumes)
        if found != self.low_channels:
            raise ValueError(f"files must hold {self.low_channels} sequences of one head, got {found}")
        weight = next(self.parameters())
        whole = torch.cat(volumes)[None].to(weight.device)
        low, high = (bands.to(weight.dtype) for bands in decompose(whole))
        training = self.training
        try:
            with torch.no_grad():
                logits = self.eval()._in_pieces(low, high)
        finally:
            self.train(training)
        middle = volumes[0][0, volumes[0].shape[1] // 2]
        grey = (middle - middle.amin()) / (middle.amax() - middle.amin()).clamp(min=1e-12)
        return Segmentation(logits, images=[grey.expand(3, -1, -1)])

    def _in_pieces(self, low: Tensor, high: Tensor) -> Tensor:
        deep = low.shape[2]
        if deep < self.depth:
            missing = (0, 0, 0, 0, 0, self.depth - deep)
            low, high = (F.pad(bands, missing, mode="replicate") for bands in (low, high))
        starts = sorted({min(start, low.shape[2] - self.depth) for start in range(0, low.shape[2], self.depth)})
        pieces = [self(*(bands.narrow(2, start, self.depth) for bands in (low, high))).logits for start in starts]
        total = pieces[0].new_zeros(*pieces[0].shape[:2], *low.shape[2:])
        count = pieces[0].new_zeros(low.shape[2], 1, 1)
        for start, piece in zip(starts, pieces):
            total.narrow(2, start, self.depth).add_(piece)
            count.narrow(0, start, self.depth).add_(1)
        return (total / count)[:, :, :deep]

    def drawn(self, output: Segmentation, names: Sequence[str] | None) -> Any:
        """The middle slice."""
        return super().drawn(replace(output, logits=output.logits[:, :, output.logits.shape[2] // 2]), names)


def _conv_norm(
    inputs: int, outputs: int, kernel_size: int = 3, stride: int = 1, *, bias: bool = False
) -> nn.Sequential:
    padding = kernel_size // 2
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, kernel_size, stride, padding, bias=bias), nn.InstanceNorm3d(outputs)
    )


def _step(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*_conv_norm(inputs, outputs, stride=stride), nn.ReLU())


def _start(module: nn.Module) -> None:
    """The authors': convolutions Kaiming normal by their fan-out, linear layers normal 0.001, biases 0."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.001)
    if isinstance(module, (nn.Conv3d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)
