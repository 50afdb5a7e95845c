"""What UPLiFT is trained with: an image at several sizes, each the truth for what came from a smaller one.

Shape letters: B batch, H, W image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.uplift.network import UPLiFT
from saccade.models.upsampling import backbone_features


def pyramid_loss(
    model: UPLiFT,
    backbone: Callable[[Tensor], Any],
    images_B3HW: Tensor,
    *,
    depth: int = 3,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sum over i = 1 .. d of MSE(i steps from the features at size S / 2^i; the features at each size they reach).

    The image of the smallest size guides the steps; the backbone is frozen. Published: d = 3 for DINOv2 at 448 pixels,
    2 for DINOv3, Adam at 1e-3, batch 32, one epoch of ImageNet; for the VAE d = 4 at 1024 pixels and noise 1.

    Args:
        model: to be trained.
        backbone: images -> features, see `saccade.models.upsampling.backbone_features`.
        images_B3HW: at size S, as the backbone wants them; S is a multiple of patch 2^d.
        depth: d.
        noise: standard deviation of what is added to the features that steps start from.
        generator: of the noise.

    Raises:
        ValueError: if the size is no such multiple, or the depth not positive.
    """
    cell = model.patch << depth
    if depth < 1 or any(n % cell for n in images_B3HW.shape[2:]):
        raise ValueError(
            f"depth must be positive and images a multiple of {model.patch} x 2^depth, got depth {depth} and "
            f"{tuple(images_B3HW.shape)}"
        )
    sizes = [[n >> i for n in images_B3HW.shape[2:]] for i in range(depth + 1)]
    pyramid = [images_B3HW, *(F.interpolate(images_B3HW, size, mode="bilinear", antialias=True) for size in sizes[1:])]
    features = [backbone_features(backbone, image, model.patch) for image in pyramid]
    loss = images_B3HW.new_zeros(())
    for level in range(1, depth + 1):
        start = features[level]
        if noise:
            start = start + noise * torch.randn(
                start.shape, generator=generator, dtype=start.dtype, device=start.device
            )
        steps = model(pyramid[level], start, iters=level, generator=generator).steps
        loss = loss + sum((out - features[level - 1 - i]).square().mean() for i, out in enumerate(steps))
    return loss
