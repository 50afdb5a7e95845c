"""CNNtention: the three modules on feature maps, and the ResNet-20 that has one after each stage.

Shape letters: B batch, C channels, H height, W width, S positions, G heads, D = C / G, E channels of given values.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.residual import BasicBlock, PaddedShortcut
from saccade.ops.attend import attend
from saccade.ops.feature_maps import check_map
from saccade.ops.statistics import channel_gate, spatial_gate

Form = Literal["self", "multi-head", "cbam"]


class SelfAttention2d(nn.Module):
    """Attention of every position to every other, weighed by gamma.

    Args:
        channels: C.
        weighted: y = gamma out + x with gamma 0 at the start; False: y = out + x.
        scaled: divide the logits by sqrt(C); the authors do not.

    Raises:
        ValueError: if `channels` is below 1.
    """

    def __init__(self, channels: int, *, weighted: bool = True, scaled: bool = False) -> None:
        super().__init__()
        _check_channels(channels)
        self.channels, self.num_heads, self.scale = channels, 1, channels**-0.5 if scaled else 1.0
        self.query, self.key, self.value = (nn.Conv2d(channels, channels, 1) for _ in range(3))
        self.gamma = nn.Parameter(torch.zeros(1)) if weighted else None

    def forward(self, x_BCHW: Tensor) -> Tensor:
        check_map(x_BCHW, self.channels, empty=True)
        q, k, v = _projections(x_BCHW, (self.query, self.key, self.value), 1)
        return _residual(x_BCHW, _as_map(_mixed(q, k, v, self.scale), x_BCHW), self.gamma)

    def mix(self, x_BCHW: Tensor, values_B1SE: Tensor) -> Tensor:
        """The weights on `x_BCHW`, applied to given values (B, 1, S, E); what `attention_map` shows."""
        q, k = _projections(x_BCHW, (self.query, self.key), 1)
        return _mixed(q, k, values_B1SE, self.scale)


class MultiHeadAttention2d(nn.Module):
    """The same with heads and a last convolution; rows belong to the keys' positions, as the authors coded it.

    Args:
        channels: C.
        num_heads: G, a divisor of C.

    Raises:
        ValueError: if the heads do not divide.
    """

    def __init__(self, channels: int, num_heads: int = 8) -> None:
        super().__init__()
        _check_channels(channels)
        if num_heads < 1 or channels % num_heads:
            raise ValueError(f"num_heads must divide channels ({channels}), got {num_heads}")
        self.channels, self.num_heads, self.scale = channels, num_heads, (channels // num_heads) ** -0.5
        self.query, self.key, self.value, self.linear = (nn.Conv2d(channels, channels, 1) for _ in range(4))
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        check_map(x_BCHW, self.channels, empty=True)
        rows, columns, v = _projections(x_BCHW, (self.key, self.query, self.value), self.num_heads)
        out_BCHW = _as_map(_mixed(rows, columns, v, self.scale), x_BCHW)
        return _residual(x_BCHW, self.linear(out_BCHW), self.gamma)

    def mix(self, x_BCHW: Tensor, values_BGSE: Tensor) -> Tensor:
        """The weights on `x_BCHW`, applied to given values (B, G, S, E); what `attention_map` shows."""
        rows, columns = _projections(x_BCHW, (self.key, self.query), self.num_heads)
        return _mixed(rows, columns, values_BGSE, self.scale)


class ResidualCBAM(nn.Module):
    """Channel gate, then spatial gate, and the input added: |y| lies between |x| and 2 |x|.

    Args:
        channels: C.
        kernel_size: of the spatial gate's convolution, odd.
        reduction: hidden units of the channel gate are C // reduction, at least 1.

    Raises:
        ValueError: if the kernel is even or the reduction below 1.
    """

    def __init__(self, channels: int, kernel_size: int = 7, reduction: int = 16) -> None:
        super().__init__()
        _check_channels(channels)
        if kernel_size < 1 or kernel_size % 2 == 0 or reduction < 1:
            raise ValueError(f"kernel_size must be odd and reduction at least 1, got {kernel_size} and {reduction}")
        self.channels = channels
        hidden = max(1, channels // reduction)
        self.down, self.up = nn.Linear(channels, hidden, bias=False), nn.Linear(hidden, channels, bias=False)
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

    def gates(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The channel gate (B, C, 1, 1), the map after it, and the spatial gate of that, (B, 1, H, W)."""
        channel = channel_gate(x_BCHW, lambda s: self.up(F.relu(self.down(s))))
        gated = channel * x_BCHW
        return channel, gated, spatial_gate(gated, self.conv)

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """Both gates multiplied, (B, C, H, W)."""
        channel, _, spatial = self.gates(x_BCHW)
        return channel * spatial

    def forward(self, x_BCHW: Tensor) -> Tensor:
        check_map(x_BCHW, self.channels, empty=True)
        _, gated, spatial = self.gates(x_BCHW)
        return torch.addcmul(x_BCHW, spatial, gated)


def cnntention(channels: int, form: Form = "self", **arguments: Any) -> nn.Module:
    """One of the three modules by name; `arguments` are its own.

    Args:
        channels: C of the maps.
        form: "self", "multi-head" or "cbam".
        **arguments: `SelfAttention2d`'s, `MultiHeadAttention2d`'s or `ResidualCBAM`'s.

    Raises:
        ValueError: if the form is unknown, or an argument is another form's.
    """
    forms = {"self": SelfAttention2d, "multi-head": MultiHeadAttention2d, "cbam": ResidualCBAM}
    if form not in forms:
        raise ValueError(f"form must be one of {', '.join(forms)}, got {form!r}")
    for name in arguments:
        if name not in inspect.signature(forms[form]).parameters:
            raise ValueError(f"form {form!r} has no option {name!r}")
    return forms[form](channels, **arguments)


class ResNet20(nn.Module):
    """The CIFAR ResNet of 16, 32 and 64 channels, with a module after each stage.

    Args:
        num_classes: of the head.
        form: "self", "multi-head", "cbam", or None for the plain network.
        in_channels: 3, or 1 for grey images.
        blocks: per stage; 3 makes ResNet-20.
        arguments: the modules' own.

    Raises:
        ValueError: if the form is unknown, or an argument is another form's or out of range.
    """

    def __init__(
        self,
        num_classes: int = 10,
        form: Form | None = None,
        *,
        in_channels: int = 3,
        blocks: tuple[int, int, int] = (3, 3, 3),
        **arguments: Any,
    ) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(in_channels, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.stages, self.attentions = nn.ModuleList(), nn.ModuleList()
        width = 16
        for stage, count in enumerate(blocks):
            outputs = 16 * 2**stage
            layers = []
            for index in range(count):
                stride = 2 if stage and index == 0 else 1
                shortcut = PaddedShortcut(width, outputs, stride)
                layers.append(BasicBlock(width, outputs, stride, shortcut=shortcut))
                width = outputs
            self.stages.append(nn.Sequential(*layers))
            self.attentions.append(nn.Identity() if form is None else cnntention(outputs, form, **arguments))
        self.fc = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> logits (B, num_classes)."""
        x_BCHW = F.relu(self.norm1(self.conv1(x_BCHW)))
        for stage, attention in zip(self.stages, self.attentions):
            x_BCHW = attention(stage(x_BCHW))
        return self.fc(x_BCHW.mean((2, 3)))


def _check_channels(channels: int) -> None:
    if channels < 1:
        raise ValueError(f"channels must be positive, got {channels}")


def _positions(x_BCHW: Tensor, heads: int) -> Tensor:
    """(B, G, S, D)."""
    return x_BCHW.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)


def _wide(positions: int, width: int) -> bool:
    """Whether the S x S weights are little beside q, k, v, so that the fused attention is the slower one."""
    return positions <= 2 * width


def _projections(x_BCHW: Tensor, layers: Sequence[nn.Module], heads: int) -> list[Tensor]:
    """(B, G, S, D) of each 1 x 1 convolution."""
    wide = _wide(x_BCHW.shape[2] * x_BCHW.shape[3], x_BCHW.shape[1] // heads)
    if wide or not all(type(layer) is nn.Conv2d for layer in layers):  # not where they are adapted or quantised
        return [_positions(layer(x_BCHW), heads) for layer in layers]
    # at once, with the channels of a position together, as the fused attention wants them
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers]) for name in ("weight", "bias"))
    y_BCHW = F.conv2d(x_BCHW.contiguous(memory_format=torch.channels_last), weight, bias)
    return [_positions(y, heads) for y in y_BCHW.chunk(len(layers), 1)]


def _mixed(q_BGSD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float) -> Tensor:
    """Softmax attention, (B, G, S, D)."""
    if not _wide(*q_BGSD.shape[2:]):
        return attend(q_BGSD, k_BGSD, v_BGSD, scale=scale)
    logits_BGSS = q_BGSD @ k_BGSD.mT
    weights_BGSS = (logits_BGSS if scale == 1 else logits_BGSS * scale).softmax(-1)
    # the result lies as v does: with the positions of a channel together, or the channels of a position
    return weights_BGSS @ v_BGSD if v_BGSD.stride(-1) == 1 else (v_BGSD.mT @ weights_BGSS.mT).mT


def _as_map(out_BGSD: Tensor, like_BCHW: Tensor) -> Tensor:
    """(B, C, H, W), channels-last as it lies."""
    return out_BGSD.transpose(1, 2).flatten(2).mT.unflatten(2, like_BCHW.shape[2:])


def _residual(x_BCHW: Tensor, out_BCHW: Tensor, gamma: Tensor | None) -> Tensor:
    if x_BCHW.is_contiguous():
        out_BCHW = out_BCHW.contiguous()
    return x_BCHW + out_BCHW if gamma is None else torch.addcmul(x_BCHW, gamma, out_BCHW)
