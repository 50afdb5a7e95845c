"""The classifier on half a latent vector, its penalty, and the decoder of the whole one.

Shape letters: B batch, D width of the latent vector, K classes, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class LatentClassifier(nn.Sequential):
    """Linear, batch norm, ReLU and dropout for each width, then linear: (B, D) -> (B, K).

    Args:
        dim: D.
        widths: of the hidden layers.
        num_classes: K.
        drop: dropout.
    """

    def __init__(self, dim: int, widths: Sequence[int], num_classes: int, drop: float = 0.5) -> None:
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(dim, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(drop)]
            dim = width
        super().__init__(*layers, nn.Linear(dim, num_classes))


def spread_penalty(module: nn.Module) -> Tensor:
    """R: the mean square of all weights of a module, norms' too.

    It favours weights that are spread over all features that serve.

    >>> spread_penalty(nn.BatchNorm1d(3)).item()
    1.0

    Args:
        module: whose parameters named "weight" are meant.
    """
    weights = [p.flatten() for name, p in module.named_parameters() if name.split(".")[-1] == "weight"]
    return torch.cat(weights).square().mean()


class LatentDecoder(nn.Module):
    """(B, D) -> images (B, 3, H, W) in [0, 1]: linear to a small map, and convolutions that double it.

    Args:
        dim: D.
        channels: of the small map and of what follows; as many doublings.
        grid: side of the small map.
        out_channels: of the images.
    """

    def __init__(self, dim: int, channels: Sequence[int], grid: int, out_channels: int = 3) -> None:
        super().__init__()
        self.shape = (channels[0], grid, grid)
        self.start = nn.Linear(dim, channels[0] * grid**2)
        layers: list[nn.Module] = []
        for a, b in zip(channels, channels[1:]):
            layers += [nn.ConvTranspose2d(a, b, 4, 2, padding=1), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]
        last = nn.ConvTranspose2d(channels[-1], out_channels, 4, 2, padding=1)
        self.layers = nn.Sequential(*layers, last, nn.Sigmoid())

    def forward(self, z_BD: Tensor) -> Tensor:
        return self.layers(self.start(z_BD).unflatten(1, self.shape))
