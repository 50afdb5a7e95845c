"""StyA2K's module: key-wise attention from a content map to a style map.

Shape letters: B batch, C channels, H height, W width, h heads, n regions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.ops.keywise import choose_regions, distributed_attention, progressive_attention


def mvn(x_BCHW: Tensor, eps: float = 1e-5) -> Tensor:
    """Mean 0 and variance 1 of each channel over the positions.

    Args:
        x_BCHW: a map.
        eps: added to the variance.
    """
    mean, std = mean_std(x_BCHW, eps)
    return (x_BCHW - mean) / std


def mean_std(x_BCHW: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Of each channel over the positions, (B, C, 1, 1); the root of the unbiased variance and `eps`."""
    correction = min(1, x_BCHW.shape[2] * x_BCHW.shape[3] - 1)  # one position has no unbiased variance
    variance, mean = torch.var_mean(x_BCHW, (2, 3), correction=correction, keepdim=True)
    return mean, (variance + eps).sqrt()


class A2K(nn.Module):
    """All-to-key attention: (B, C, H, W) of the content and (B, C, H', W') of the style to (B, C, H, W).

    Args:
        dim: C.
        region: side of a region.
        num_heads: divides C.

    Raises:
        ValueError: if the heads do not divide C or the region is empty.
    """

    def __init__(self, dim: int, region: int, num_heads: int = 8) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}), got {num_heads}")
        if region < 1:
            raise ValueError(f"region must be at least 1, got {region}")
        self.region, self.num_heads = region, num_heads
        self.q, self.k, self.v, self.q2, self.k2, self.v2 = (nn.Conv2d(dim, dim, 1) for _ in range(6))
        self.fusion1, self.fusion2 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))
        self.apply(start)

    def forward(self, content_BCHW: Tensor, style_BCHW: Tensor) -> Tensor:
        """
        Raises:
            ValueError: if the maps do not agree in batch and channels.
        """
        content, style = mvn(content_BCHW), mvn(style_BCHW)
        distributed = distributed_attention(
            self.q(content), self.k(style), self.v(style_BCHW),
            region=self.region, num_heads=self.num_heads, alpha=self.alpha, beta=self.beta,
        )  # fmt: skip
        progressive, _ = progressive_attention(
            self.q2(content), self.k2(style), self.v2(style_BCHW), region=self.region, num_heads=self.num_heads
        )
        return self.fusion1(distributed) + self.fusion2(progressive) + content_BCHW

    def chosen(self, content_BCHW: Tensor, style_BCHW: Tensor) -> Tensor:
        """The style region that each content region attends to, (B, h, n)."""
        q, k = self.q2(mvn(content_BCHW)), self.k2(mvn(style_BCHW))
        return choose_regions(q, k, region=self.region, num_heads=self.num_heads)


def start(module: nn.Module) -> None:
    """Convolutions normal 0.02, biases 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
