"""What reads the maps: a pooled linear head, attention over blocks and noise steps, and the layers of the feedback.

Shape letters: B batch, C channels, s side of a pooled map, N tokens, D their width, T noise steps, K classes, H and W
of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.layers.convolution import depthwise
from saccade.layers.mlp import MLP
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.softmax_attention import SoftmaxAttention
from saccade.models.diffssl.unet import group_norm

#: maps by the number of their block
Maps = Mapping[int, Tensor]
#: words of a feedback's layout that leave the channels as they are
_SIMPLE: Mapping[str, Callable[[int], nn.Module]] = {
    "B": nn.BatchNorm2d,
    "G": group_norm,
    "R": lambda channels: nn.ReLU(),
    "S": lambda channels: nn.SiLU(),
}


class PooledHead(nn.Module):
    """A map pooled to p x p, and linear layers on all its numbers.

    Args:
        channels: C.
        num_classes: K.
        pool: p.
        hidden: widths of ReLU layers between; none is linear.
    """

    def __init__(self, channels: int, num_classes: int, *, pool: int = 2, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.pool, widths = pool, [channels * pool**2, *hidden, num_classes]
        self.layers = nn.ModuleList(nn.Linear(n, m) for n, m in zip(widths, widths[1:]))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        x = F.adaptive_avg_pool2d(x_BCHW, self.pool).flatten(1)
        for number, layer in enumerate(self.layers):
            x = layer(F.relu(x) if number else x)
        return x


class TokenMap(nn.Module):
    """A map as tokens: pooled to s x s, normalised, mapped to D: (B, s^2, D).

    Args:
        channels: C.
        side: s.
        dim: D.
        norm: "layer": over channels and places; "batch".
    """

    def __init__(self, channels: int, side: int, dim: int, norm: Literal["layer", "batch"] = "layer") -> None:
        super().__init__()
        self.side = side
        self.norm: nn.Module = nn.LayerNorm((channels, side, side)) if norm == "layer" else nn.BatchNorm2d(channels)
        self.map = nn.Conv2d(channels, dim, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.map(self.norm(F.adaptive_avg_pool2d(x_BCHW, self.side))).flatten(2).mT


class AttentionFusion(nn.Module):
    """Tokens of all maps of a noise step, a class token before them, pre-norm blocks; the class tokens of all steps,
    side by side, tell the class. Order and place of tokens are not told.

    Args:
        channels, sizes: of each block that is read, by its number: C, and the side of its map.
        num_classes: K.
        steps: T.
        pool: the longest side s of a pooled map.
        dim, num_heads, hidden, depth: of the blocks of the transformer; `hidden` is 4 dim where None.
        norm: of maps, "layer" or "batch".
        pooled: "class": the class token; "mean": the mean of all tokens, and no class token.

    Raises:
        ValueError: if no block is read, sizes do not fit, or a word is unknown.
    """

    def __init__(
        self,
        channels: Mapping[int, int],
        sizes: Mapping[int, int],
        num_classes: int,
        *,
        steps: int = 1,
        pool: int = 16,
        dim: int = 1024,
        num_heads: int = 8,
        hidden: int | None = None,
        depth: int = 2,
        norm: Literal["layer", "batch"] = "layer",
        pooled: Literal["class", "mean"] = "class",
    ) -> None:
        super().__init__()
        if norm not in ("layer", "batch") or pooled not in ("class", "mean"):
            raise ValueError(f"norm must be 'layer' or 'batch' and pooled 'class' or 'mean', got {norm!r}, {pooled!r}")
        if not channels or set(channels) != set(sizes) or min(steps, pool, num_classes, *sizes.values()) < 1:
            raise ValueError(
                f"channels and sizes must be of the same blocks, one at least, and steps, pool and num_classes "
                f"positive, got blocks {sorted(channels)} and {sorted(sizes)}, {steps}, {pool} and {num_classes}"
            )
        self.steps = steps
        self.tokens = nn.ModuleDict(
            {str(b): TokenMap(channels[b], min(sizes[b], pool), dim, norm) for b in sorted(channels)}
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim)) if pooled == "class" else None
        self.blocks = nn.ModuleList(
            PreNormBlock(SoftmaxAttention(dim, num_heads, rope=False, proj_bias=True), dim, mlp=MLP(dim, hidden))
            for _ in range(depth)
        )
        self.head = nn.Linear(steps * dim, num_classes)

    def forward(self, first: Sequence[Maps], second: Sequence[Maps] = ()) -> Tensor:
        """Logits (B, K).

        Args:
            first: of each noise step the maps that are read in the first pass.
            second: of the second pass, where there is one; the same layers read them.

        Raises:
            ValueError: if they are not of as many steps, or of other blocks than the layers are for.
        """
        passes = [given for given in (first, second) if given]
        if not passes or any(len(given) != self.steps for given in passes):
            raise ValueError(f"maps must be of {self.steps} noise steps, got {[len(given) for given in passes]}")
        strange = {b for given in passes for maps in given for b in maps if str(b) not in self.tokens}
        if strange:
            raise ValueError(f"maps must be of the blocks {', '.join(self.tokens)}, got {sorted(strange)}")
        return self.head(torch.cat([self._fused([given[t] for given in passes]) for t in range(self.steps)], -1))

    def _fused(self, passes: Sequence[Maps]) -> Tensor:
        x_BND = torch.cat([self.tokens[str(b)](x_BCHW) for maps in passes for b, x_BCHW in maps.items()], 1)
        if self.class_token is not None:
            x_BND = torch.cat([self.class_token.expand(len(x_BND), -1, -1), x_BND], 1)
        for block in self.blocks:
            x_BND = block(x_BND)
        return x_BND[:, 0] if self.class_token is not None else x_BND.mean(1)


class FeedbackResidual(nn.Module):
    """GN, SiLU, 1 x 1; GN, SiLU, 3 x 3 that starts as zero; plus a 1 x 1 of x.

    Args:
        in_channels, out_channels: C before and after.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(in_channels), group_norm(out_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1)
        for parameter in self.conv2.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h_BCHW = self.conv1(F.silu(self.norm1(x_BCHW)))
        return self.skip(x_BCHW) + self.conv2(F.silu(self.norm2(h_BCHW)))


class FeedbackLayer(nn.Sequential):
    """phi_b: what a block of the way up says to the one that it faces.

    Args:
        in_channels, out_channels: C of either block.
        layout: words joined by "_", one after the other: "C" a 1 x 1 convolution, a further "C" a 3 x 3 of each channel
            alone (both without bias), "B" batch norm, "G" group norm, "R" ReLU, "S" SiLU, "Res" a residual block.

    Raises:
        ValueError: if a word is unknown, or the channels never change from `in_channels` to `out_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, layout: str = "C_B_R") -> None:
        layers: list[nn.Module] = []
        channels, changed = in_channels, False
        for word in layout.split("_"):
            if word == "C":
                layer: nn.Module = depthwise(channels, 3, bias=False)
                if not changed:
                    layer = nn.Conv2d(channels, out_channels, 1, bias=False)
            elif word == "Res":
                layer = FeedbackResidual(channels, out_channels)
            elif word in _SIMPLE:
                layer = _SIMPLE[word](channels)
            else:
                raise ValueError(f"layout must be of C, B, G, R, S and Res, joined by '_', got {layout!r}")
            if word in ("C", "Res"):
                channels, changed = out_channels, True
            layers.append(layer)
        if not changed:
            raise ValueError(f"layout must have a C or a Res, got {layout!r}")
        super().__init__(*layers)
