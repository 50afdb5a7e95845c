"""DFYP's networks: a convolutional branch behind the operators and a vision transformer, mixed by learned numbers.

Shape letters: B batch, C bands, H height, W width, N tokens, D width of the transformer, T dates, G tiles, K targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.dfyp.operators import BandGate, CropGate, YearRouter
from saccade.ops.export import output
from saccade.ops.feature_maps import check_map


@output
@dataclass
class Prediction:
    """What a network says of a quantity.

    Attributes:
        values: (B, K), a1 cnn + a2 transformer.
        cnn, transformer: (B, K) of each branch alone.
    """

    values: Tensor
    cnn: Tensor
    transformer: Tensor


class VisionTransformer(nn.Module):
    """Patches, a class token, learned positions, pre-norm blocks, a linear head (vit-pytorch's form).

    Args:
        size: height and width of the images, of whole patches.
        patch: side of a patch.
        channels: C.
        num_classes: K.
        dim: D.
        depth, num_heads, head_dim, hidden: of the blocks.
        dropout: in the blocks, of weights too, and of the tokens before them.

    Raises:
        ValueError: if a number is not positive, or patches do not fill the image.
    """

    def __init__(
        self,
        size: Sequence[int],
        patch: int,
        channels: int,
        num_classes: int,
        *,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 8,
        head_dim: int = 64,
        hidden: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if min(*size, patch, channels, num_classes, depth) < 1 or any(side % patch for side in size):
            raise ValueError(
                "size, patch, channels, num_classes and depth must be positive and patches fill the size, got "
                f"{tuple(size)}, {patch}, {channels}, {num_classes} and {depth}"
            )
        self.size, self.patch, self.channels = tuple(size), patch, channels
        width = channels * patch * patch
        self.embed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim), nn.LayerNorm(dim))
        self.class_token = nn.Parameter(torch.randn(1, 1, dim))
        self.positions = nn.Parameter(torch.randn(1, size[0] * size[1] // patch**2 + 1, dim))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                PreNormBlock(
                    SoftmaxAttention(
                        dim, num_heads, head_dim=head_dim, rope=False, proj_bias=True, attn_drop=dropout
                    ),
                    dim, hidden, drop=dropout, attention_drop=dropout,
                )
                for _ in range(depth)
            )
        )  # fmt: skip
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, K).

        Raises:
            ValueError: if the images are not (B, C, H, W) of the size.
        """
        check_map(x_BCHW, self.channels)
        if tuple(x_BCHW.shape[2:]) != self.size:
            raise ValueError(f"images must be {self.size[0]} x {self.size[1]}, got {tuple(x_BCHW.shape[2:])}")
        # a token's numbers: row, column, and band innermost
        patches = x_BCHW.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch).permute(0, 2, 3, 4, 5, 1)
        words_BND = self.embed(patches.flatten(3).flatten(1, 2))
        tokens_BND = torch.cat([self.class_token.expand(len(words_BND), -1, -1), words_BND], 1) + self.positions
        return self.head(self.norm(self.blocks(self.dropout(tokens_BND))[:, 0]))


class SameBlock(nn.Module):
    """Convolution 3 x 3 that gives ceil(n / stride) pixels (TensorFlow's "same": an odd pixel of padding comes last),
    batch norm, ReLU, dropout.

    Args:
        in_channels, out_channels, stride: of the convolution.
        dropout: at the end.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(in_channels, out_channels, 3, stride), nn.BatchNorm2d(out_channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        stride = self.conv.stride[0]
        height, width = (max((-(-n // stride) - 1) * stride + 3 - n, 0) for n in x_BCHW.shape[2:])
        x_BCHW = F.pad(x_BCHW, (width // 2, width - width // 2, height // 2, height - height // 2))
        return self.dropout(F.relu(self.norm(self.conv(x_BCHW))))


class DFYPModis(nn.Module):
    """DFYP on histograms of a county: bands x time x bins.

        x = RCA_max(input);   cnn of w o_year(x) + (1 - w) x;   transformer of x;   a1 cnn + a2 transformer

    Args:
        channels: C.
        size: dates and bins.
        num_classes: K.
        reduction: of the gate of bands.
        years, default: operators of the prediction years, see `YearRouter`.
        widths: of the six convolutions: the first, the next two, the last three.
        dense: width before the CNN's answer.
        dim, depth, num_heads, hidden, patch: of the transformer, with 64 channels a head.
        dropout, cnn_dropout: of the transformer and of the convolutions.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        channels: int = 9,
        size: Sequence[int] = (32, 32),
        num_classes: int = 1,
        *,
        reduction: int = 16,
        years: Mapping[int, str] | None = None,
        default: str = "learnable",
        widths: Sequence[int] = (128, 256, 512),
        dense: int = 2048,
        dim: int = 256,
        depth: int = 4,
        num_heads: int = 8,
        hidden: int = 512,
        patch: int = 4,
        dropout: float = 0.1,
        cnn_dropout: float = 0.5,
    ) -> None:
        super().__init__()
        first, second, third = _positive(widths, "widths", 3)
        self.gate, self.router = BandGate(channels, reduction), YearRouter(years, default)
        self.operator_weight = nn.Parameter(torch.tensor(0.5))
        steps = ((first, 1), (second, 2), (second, 1), (third, 2), (third, 1), (third, 2))
        inputs = (channels, *(width for width, _ in steps))
        self.convs = nn.Sequential(*(SameBlock(i, o, s, cnn_dropout) for i, (o, s) in zip(inputs, steps)))
        pixels = [-(-n // 8) for n in _positive(size, "size", 2)]
        self.dense = nn.Sequential(nn.Linear(third * pixels[0] * pixels[1], dense), nn.Linear(dense, num_classes))
        self.transformer = VisionTransformer(
            size,
            patch,
            channels,
            num_classes,
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            hidden=hidden,
            dropout=dropout,
        )
        self.cnn_weight, self.transformer_weight = (nn.Parameter(torch.tensor(0.5)) for _ in range(2))
        for module in (*self.convs.modules(), *self.dense):
            _start(module)

    def forward(self, x_BCHW: Tensor, year_B: Tensor) -> Prediction:
        """
        Args:
            x_BCHW: histograms (B, C, dates, bins).
            year_B: the prediction year of each.

        Raises:
            ValueError: if they do not fit the network.
        """
        check_map(x_BCHW, self.transformer.channels)
        x_BCHW = self.gate(x_BCHW)
        transformer_BK = self.transformer(x_BCHW)
        cnn_BK = self.dense(self.features(x_BCHW, year_B))
        return Prediction(self.cnn_weight * cnn_BK + self.transformer_weight * transformer_BK, cnn_BK, transformer_BK)

    def features(self, x_BCHW: Tensor, year_B: Tensor) -> Tensor:
        """The last map of the convolutions, of what the gate of bands gives, in a row: (B, features)."""
        edges_BCHW = self.router(x_BCHW, year_B)
        return self.convs(self.operator_weight * edges_BCHW + (1 - self.operator_weight) * x_BCHW).flatten(1)


class DFYPSentinel(nn.Module):
    """DFYP on colour images of a county: some dates, some tiles.

        x = RCA_avg(image);   cnn(mean over images of convolutions(w o(x) + (1 - w) x));   mean of transformer(x)

    Args:
        num_classes: K.
        image_size, patch: of the transformer's images.
        reduction: of the gate of bands.
        operator: of the crop, see `CropGate`.
        widths: of the four convolutions: the first, the second, the last two.
        dim, depth, num_heads, hidden: of the transformer, with 32 channels a head.
        dropout: of the transformer and of what the CNN answers from; of its convolutions half of it.
        chunk: images that are looked at together.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        num_classes: int = 2,
        *,
        image_size: int = 224,
        patch: int = 16,
        reduction: int = 8,
        operator: str = "sobel",
        widths: Sequence[int] = (32, 64, 128),
        dim: int = 128,
        depth: int = 6,
        num_heads: int = 6,
        hidden: int = 256,
        dropout: float = 0.5,
        chunk: int = 8,
    ) -> None:
        super().__init__()
        first, second, third = _positive(widths, "widths", 3)
        _positive((chunk,), "chunk", 1)
        if image_size < 8:
            raise ValueError(f"image_size must be at least 8, got {image_size}")
        self.chunk, self.gate, self.operator = chunk, BandGate(3, reduction, "avg"), CropGate(operator)
        inner = dropout / 2
        self.convs = nn.Sequential(
            *_conv(3, first, 0.0), nn.MaxPool2d(2),
            *_conv(first, second, inner), nn.MaxPool2d(2),
            *_conv(second, third, inner), nn.MaxPool2d(2),
            *_conv(third, third, inner),
        )  # fmt: skip
        self.dropout = nn.Dropout(dropout)
        self.dense = nn.Sequential(
            nn.Linear(third, third), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(third, second), nn.ReLU(), nn.Dropout(dropout),
            nn.Linear(second, num_classes),
        )  # fmt: skip
        self.transformer = VisionTransformer(
            (image_size, image_size), patch, 3, num_classes,
            dim=dim, depth=depth, num_heads=num_heads, head_dim=32, hidden=hidden, dropout=dropout,
        )  # fmt: skip
        self.cnn_weight, self.transformer_weight = (nn.Parameter(torch.full((num_classes,), 0.5)) for _ in range(2))
        self.apply(_start)

    def forward(self, x_BTGCHW: Tensor) -> Prediction:
        """Images (B, T, G, 3, H, W), of any number of dates and tiles, which are averaged.

        Raises:
            ValueError: if they do not fit the network.
        """
        if x_BTGCHW.ndim != 6 or 0 in x_BTGCHW.shape[1:3]:
            raise ValueError(f"x must be (batch, dates, tiles, 3, height, width), got {tuple(x_BTGCHW.shape)}")
        cnn, transformer = [], []
        for images in x_BTGCHW.flatten(0, 2).split(self.chunk):
            check_map(images, 3)
            gated = self.gate(images)
            transformer.append(self.transformer(gated))
            cnn.append(self.convs(self.operator(gated)).mean((2, 3)))
        batch = len(x_BTGCHW)
        transformer_BK, mean_BC = (torch.cat(each).unflatten(0, (batch, -1)).mean(1) for each in (transformer, cnn))
        cnn_BK = self.dense(self.dropout(mean_BC))
        return Prediction(self.cnn_weight * cnn_BK + self.transformer_weight * transformer_BK, cnn_BK, transformer_BK)


def yield_loss(predicted: Tensor, target: Tensor, *, absolute: float = 0.0) -> Tensor:
    """The mean square, and the mean absolute error as often as `absolute` says.

    Args:
        predicted, target: of one shape.
        absolute: weight of the second.
    """
    loss = F.mse_loss(predicted, target)
    return loss + absolute * F.l1_loss(predicted, target) if absolute else loss


def errors(predicted: Tensor, target: Tensor) -> dict[str, float]:
    """`rmse`, `me` (mean error), `mae`, and `r2`, the share of the variance that is explained.

    Args:
        predicted, target: of one shape, with some variance.
    """
    off = (predicted - target).double()
    variance = (target - target.mean()).double().square().mean()
    square = off.square().mean()
    return {
        "rmse": square.sqrt().item(),
        "me": off.mean().item(),
        "mae": off.abs().mean().item(),
        "r2": (1 - square / variance).item(),
    }


def _conv(inputs: int, outputs: int, dropout: float) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Dropout(dropout)


def _positive(numbers: Sequence[int], name: str, count: int) -> tuple[int, ...]:
    if len(numbers) != count or min(numbers) < 1:
        raise ValueError(f"{name} must be {count} positive numbers, got {tuple(numbers)}")
    return tuple(numbers)


def _start(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
