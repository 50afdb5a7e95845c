"""Domain attention: the bank of adapters on feature maps, and the detector's trunk and heads around it.

Shape letters: B batch, C channels, R reduced channels, N adapters, H height, W width, P regions, A anchors, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import conv_norm_relu
from saccade.layers.initialization import start_convolution
from saccade.layers.residual import Bottleneck
from saccade.ops.feature_maps import check_map


class DomainAttention(nn.Module):
    """x (B, C, H, W) -> y of the same shape and memory format, any H and W.

    Args:
        channels: C.
        num_adapters: N; the paper has 3 to 7 for five domains and 6 to 11 for eleven.
        reduction: r; an adapter is C // r wide, at least 1.

    Raises:
        ValueError: if an argument is below 1, or the input is not (B, C, H, W).
    """

    def __init__(self, channels: int, num_adapters: int = 11, reduction: int = 16) -> None:
        super().__init__()
        if min(channels, num_adapters, reduction) < 1:
            raise ValueError(
                f"channels, num_adapters and reduction must be positive, got {channels}, {num_adapters} and {reduction}"
            )
        self.channels, self.num_adapters = channels, num_adapters
        hidden = max(1, channels // reduction)
        self.reduce = nn.Linear(channels, num_adapters * hidden)
        self.expand_weight = nn.Parameter(torch.empty(num_adapters, channels, hidden))
        self.expand_bias = nn.Parameter(torch.empty(num_adapters, channels))
        self.assign = nn.Linear(channels, num_adapters) if num_adapters > 1 else None
        for parameter in (self.expand_weight, self.expand_bias):  # as N separate linear layers start
            nn.init.uniform_(parameter, -(hidden**-0.5), hidden**-0.5)

    def bank(self, pooled_BC: Tensor) -> Tensor:
        """U, what each adapter answers to the pooled map: (B, C, N)."""
        hidden_BNR = F.relu(self.reduce(pooled_BC)).unflatten(1, (self.num_adapters, -1))
        return torch.einsum("bnr,ncr->bcn", hidden_BNR, self.expand_weight) + self.expand_bias.T

    def assignment(self, pooled_BC: Tensor) -> Tensor:
        """w, the share of each domain: (B, N), rows sum to 1."""
        if self.assign is None:
            return torch.ones_like(pooled_BC[:, :1])
        return self.assign(pooled_BC).softmax(-1)

    def forward(self, x_BCHW: Tensor, domain_B: Tensor | None = None) -> Tensor:
        """Gate the map; with `domain_B` (integers below N) by the adapter of that number alone."""
        return x_BCHW * self._gate(x_BCHW, domain_B)

    def gate(self, x_BCHW: Tensor) -> Tensor:
        """The factor, (B, C, H, W): `module(x) == x * module.gate(x)`."""
        return self._gate(x_BCHW, None).expand_as(x_BCHW)

    def _gate(self, x_BCHW: Tensor, domain_B: Tensor | None) -> Tensor:
        check_map(x_BCHW, self.channels, empty=True)
        pooled_BC = x_BCHW.mean((2, 3))
        if domain_B is None:
            share_BN = self.assignment(pooled_BC)
        else:
            share_BN = F.one_hot(domain_B, self.num_adapters).to(pooled_BC.dtype)
        return (self.bank(pooled_BC) @ share_BN[..., None]).sigmoid()[..., None]

    def extra_repr(self) -> str:
        return f"channels={self.channels}, num_adapters={self.num_adapters}"


def adapters_of_blocks(
    counts: Sequence[int], num_adapters: int, *, less_blocks: bool = False, fixed_stages: int = 1
) -> list[list[int]]:
    """How many adapters each block of a network has, by stage; 1 where it is a single SE layer.

    Args:
        counts: blocks of each stage.
        num_adapters: N.
        less_blocks: N in every other block only: those of odd number in all stages but the fourth, those of even
            number there; blocks are numbered from 0.
        fixed_stages: so many first stages have single SE layers everywhere.
    """
    return [
        [
            1 if stage < fixed_stages or (less_blocks and block % 2 == (1 if stage == 3 else 0)) else num_adapters
            for block in range(count)
        ]
        for stage, count in enumerate(counts)
    ]


class DomainAttentionResNet(nn.Module):
    """The trunk that all domains share: a ResNet of bottlenecks with domain attention in each.

    Args:
        counts: blocks of the four stages, (3, 4, 6, 3) for ResNet-50.
        width: of the first stage, 64.
        num_adapters: N.
        reduction: r.
        less_blocks, fixed_stages: where the adapters are, see `adapters_of_blocks`.
        in_channels: 3, or 1 for grey images.

    Raises:
        ValueError: if `counts` are not those of four stages, or a number is below 1.
    """

    def __init__(
        self,
        counts: Sequence[int] = (3, 4, 6, 3),
        *,
        width: int = 64,
        num_adapters: int = 11,
        reduction: int = 16,
        less_blocks: bool = False,
        fixed_stages: int = 1,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if len(counts) != 4 or min(counts) < 1:
            raise ValueError(f"counts must be the blocks of four stages, got {tuple(counts)}")
        self.stem = conv_norm_relu(in_channels, width, 7, 2)
        self.stages = nn.ModuleList()
        channels = width
        plan = adapters_of_blocks(counts, num_adapters, less_blocks=less_blocks, fixed_stages=fixed_stages)
        for stage, adapters in enumerate(plan):
            blocks = []
            for index, number in enumerate(adapters):
                stride = 2 if stage and index == 0 else 1
                blocks.append(bottleneck(channels, width * 2**stage, stride, number, reduction))
                channels = width * 2**stage * Bottleneck.expansion
            self.stages.append(nn.Sequential(*blocks))
        self.apply(start_convolution)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images to the map that proposals and regions are taken from, (B, 16 width, H / 16, W / 16)."""
        x_BCHW = self.stem(x_BCHW)
        x_BCHW = F.max_pool2d(x_BCHW, 3, 2, ceil_mode=True) if min(x_BCHW.shape[2:]) > 1 else x_BCHW
        for stage in self.stages[:3]:
            x_BCHW = stage(x_BCHW)
        return x_BCHW

    def regions(self, x_PCHW: Tensor) -> Tensor:
        """Pooled regions of that map to one vector each by the fourth stage, (P, 32 width)."""
        return self.stages[3](x_PCHW).mean((2, 3))


class UniversalHeads(nn.Module):
    """What each data set has of its own: the last layers of proposals and of regions.

    Args:
        classes: K of each data set, its background among them.
        anchors: A of each data set.
        channels: of the map that proposals are taken from.
        region_channels: of a region's vector.
        hidden: of the shared 3 x 3 convolution.
        class_agnostic: 4 numbers for a box instead of 4 per class.

    Raises:
        ValueError: if classes and anchors are not one positive number for each data set.
    """

    def __init__(
        self,
        classes: Sequence[int],
        anchors: Sequence[int],
        *,
        channels: int = 1024,
        region_channels: int = 2048,
        hidden: int = 512,
        class_agnostic: bool = False,
    ) -> None:
        super().__init__()
        if not classes or len(classes) != len(anchors) or min(*classes, *anchors) < 1:
            raise ValueError(f"classes and anchors must be one number per data set, got {classes} and {anchors}")
        self.shared = nn.Conv2d(channels, hidden, 3, padding=1)
        self.score = nn.ModuleList(nn.Conv2d(hidden, 2 * a, 1) for a in anchors)
        self.shift = nn.ModuleList(nn.Conv2d(hidden, 4 * a, 1) for a in anchors)
        self.label = nn.ModuleList(nn.Linear(region_channels, k) for k in classes)
        self.box = nn.ModuleList(nn.Linear(region_channels, 4 if class_agnostic else 4 * k) for k in classes)

    def proposals(self, x_BCHW: Tensor, domain: int) -> tuple[Tensor, Tensor]:
        """Scores (B, 2 A, H, W) and shifts (B, 4 A, H, W) of the anchors of data set `domain`."""
        x_BCHW = F.relu(self.shared(x_BCHW))
        return self.score[domain](x_BCHW), self.shift[domain](x_BCHW)

    def forward(self, x_PC: Tensor, domain: int) -> tuple[Tensor, Tensor]:
        """Logits (P, K) and boxes (P, 4 K or 4) of regions, as data set `domain` labels them."""
        return self.label[domain](x_PC), self.box[domain](x_PC)


def bottleneck(
    in_channels: int, width: int, stride: int, num_adapters: int, reduction: int, projected: bool = False
) -> Bottleneck:
    return Bottleneck(
        in_channels, width, stride, gate=lambda c: DomainAttention(c, num_adapters, reduction), projected=projected
    )
