"""What AMFusionNet's halves learn from: each image of a pair rebuilt by itself.

Shape letters: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.structure import gaussian, smooth, sobel, ssim, ssim_terms

if TYPE_CHECKING:
    from saccade.models.amfusionnet.network import AMFusionNet

#: of the terms, beside 1 for MSE and SSIM
GRADIENT, MULTI_SCALE = 10.0, 0.005


def multi_scale_loss(
    a_B1HW: Tensor,
    b_B1HW: Tensor,
    *,
    sigmas: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0),
    data_range: float = 1.0,
    alpha: float = 0.025,
    compensation: float = 200.0,
) -> Tensor:
    """compensation (alpha (1 - l_M prod_j cs_j) + (1 - alpha) G_M |a - b| / L), the mean over pixels.

    l and cs are SSIM's two factors under Gaussian windows of all deviations, l_M and G_M of the largest; past the
    border are zeros. Zhao, Gallo, Frosio, Kautz, "Loss Functions for Image Restoration with Neural Networks", IEEE
    Transactions on Computational Imaging 3 (2017).

    Args:
        a_B1HW, b_B1HW: images.
        sigmas: deviations in pixels, small to large; all windows are four of the largest wide.
        data_range: L.
        alpha: the share of MS-SSIM.
        compensation: of the whole.
    """
    size = int(4 * sigmas[-1]) + 1
    structure = torch.ones_like(a_B1HW)
    for sigma in sigmas:
        window = gaussian(size, sigma)
        luminance, contrast = ssim_terms(a_B1HW, b_B1HW, window, data_range=data_range, border="constant")
        structure = structure * contrast
    far = smooth((a_B1HW - b_B1HW).abs(), window, "constant") / data_range
    return compensation * (alpha * (1 - luminance * structure) + (1 - alpha) * far).mean()


def rebuilding_loss(rebuilt_B1HW: Tensor, image_B1HW: Tensor) -> Tensor:
    """MSE + 10 L1(grad) + (1 - SSIM) / 2 + 0.005 of `multi_scale_loss`, for one image of a pair.

    grad is Sobel's by eighths, along both axes; SSIM has a window of 3 pixels (of deviation 1.5, which the card leaves
    open).

    Args:
        rebuilt_B1HW: what the decoder makes of it.
        image_B1HW: the image, in [0, 1].
    """
    slope = (sobel(rebuilt_B1HW) - sobel(image_B1HW)).abs().mean() / 8
    unlike = (1 - ssim(rebuilt_B1HW, image_B1HW, size=3, border="reflect")).mean() / 2
    scales = multi_scale_loss(rebuilt_B1HW, image_B1HW)
    return F.mse_loss(rebuilt_B1HW, image_B1HW) + GRADIENT * slope + unlike + MULTI_SCALE * scales


def pair_loss(model: AMFusionNet, infrared: Tensor, visible: Tensor) -> Tensor:
    """The sum of `rebuilding_loss` over the two images of a pair, each through both halves of the model.

    Args:
        model: learns.
        infrared, visible: grey images (B, 1, H, W) in [0, 1].
    """
    return sum((rebuilding_loss(model.reconstruct(x), x) for x in (infrared, visible)), infrared.new_zeros(()))
