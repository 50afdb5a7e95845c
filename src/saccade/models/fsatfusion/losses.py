"""What FSATFusion learns from: two images, and no truth.

    L = |F - I_ir|^2 + |F - I_vi|^2 + 10 (1 - SSIM(F, max(I_ir, I_vi))) + 100 L_grad

Shape letters: B batch, H height, W width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.structure import sobel, ssim

#: of the terms, beside 1 for each image's squared error
STRUCTURE, GRADIENT = 10.0, 100.0


def structure_loss(fused_B1HW: Tensor, infrared_B1HW: Tensor, visible_B1HW: Tensor) -> Tensor:
    """1 - SSIM of the fused image with the pixelwise larger of the two, the mean over whole windows of 11 pixels.

    The data range is 1, or 2 where the fused image goes below -0.5.

    Args:
        fused_B1HW, infrared_B1HW, visible_B1HW: images of one shape, at least 11 pixels high and wide.

    Raises:
        ValueError: if they are smaller.
    """
    data_range = torch.where(fused_B1HW.detach().amin() < -0.5, 2.0, 1.0)
    return 1 - ssim(fused_B1HW, torch.maximum(infrared_B1HW, visible_B1HW), data_range=data_range).mean()


def gradient_loss(
    fused_B1HW: Tensor, infrared_B1HW: Tensor, visible_B1HW: Tensor, *, of: Literal["mean", "pixels"] = "mean"
) -> Tensor:
    """|G(F) - max(G(ir), G(vi))|.

    Args:
        fused_B1HW, infrared_B1HW, visible_B1HW: images of one shape.
        of: "mean" as released: G is one number, the mean over batch and pixels of both Sobel gradients with their
            signs (zeros past the border), in which all but the border cancels out. "pixels", the usual reading: G is
            |d_x| + |d_y| of each pixel, and the loss the mean difference.

    Raises:
        ValueError: if `of` is unknown.
    """
    if of not in ("mean", "pixels"):
        raise ValueError(f"of must be 'mean' or 'pixels', got {of!r}")
    both = [sobel(x, border="constant").squeeze(1) for x in (fused_B1HW, infrared_B1HW, visible_B1HW)]
    fused, infrared, visible = (g.abs().sum(1) if of == "pixels" else g.sum(1).mean() for g in both)
    return (fused - torch.maximum(infrared, visible)).abs().mean()


def fusion_loss(
    fused_B1HW: Tensor, infrared_B1HW: Tensor, visible_B1HW: Tensor, *, gradient: Literal["mean", "pixels"] = "mean"
) -> Tensor:
    """L.

    Args:
        fused_B1HW: the network's image.
        infrared_B1HW, visible_B1HW: what it was made of, in [0, 1].
        gradient: `of` in `gradient_loss`.

    Raises:
        ValueError: if the images are smaller than 11 pixels or `gradient` is unknown.
    """
    inputs = (infrared_B1HW, visible_B1HW)
    near = sum((F.mse_loss(fused_B1HW, x) for x in inputs), fused_B1HW.new_zeros(()))
    structure = structure_loss(fused_B1HW, *inputs)
    return near + STRUCTURE * structure + GRADIENT * gradient_loss(fused_B1HW, *inputs, of=gradient)
