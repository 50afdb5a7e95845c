"""Local structure of images: Gaussian windows, Sobel's gradients, structural similarity.

    SSIM(a, b) = (2 mu_a mu_b + C1) (2 s_ab + C2) / ((mu_a^2 + mu_b^2 + C1) (s_a^2 + s_b^2 + C2))

with means, variances and covariance under a Gaussian window, C1 = (0.01 L)^2, C2 = (0.03 L)^2 and L the data range:
Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", IEEE Transactions on Image Processing 13 (2004). Its two
factors are `luminance` and `contrast` here.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.constants import at_home

__all__ = ["gaussian", "smooth", "sobel", "ssim", "ssim_terms"]

#: how `smooth` goes on past the border: not at all (the map becomes smaller), by zeros, by the mirrored image
BORDERS = ("valid", "constant", "reflect")


def gaussian(size: int, sigma: float) -> Tensor:
    """A Gaussian window (size,) in double precision, that sums to 1.

    Args:
        size: pixels.
        sigma: its deviation in pixels.

    Raises:
        ValueError: if either is not positive.

    >>> gaussian(3, 1.0).tolist()
    [0.2740..., 0.4518..., 0.2740...]
    """
    if size < 1 or sigma <= 0:
        raise ValueError(f"size and sigma must be positive, got {size} and {sigma}")
    distance = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    weight = (-distance.square() / (2 * sigma**2)).exp()
    return weight / weight.sum()


def smooth(x_BCHW: Tensor, window: Tensor, border: str = "valid") -> Tensor:
    """Each channel under a window along height and width.

    Args:
        x_BCHW: maps.
        window: (size,), of an odd size where the border is not "valid".
        border: of `BORDERS`.

    Raises:
        ValueError: if the border is unknown, or the maps are smaller than the window needs.
    """
    if border not in BORDERS:
        raise ValueError(f"border must be one of {', '.join(BORDERS)}, got {border!r}")
    size, channels = len(window), x_BCHW.shape[1]
    least = {"valid": size, "constant": 1, "reflect": size // 2 + 1}[border]
    if min(x_BCHW.shape[2:]) < least:
        raise ValueError(f"height and width must be at least {least}, got {tuple(x_BCHW.shape[2:])}")
    if border != "valid":
        x_BCHW = F.pad(x_BCHW, [size // 2] * 4, mode=border)
    kernel = window.to(x_BCHW).expand(channels, 1, 1, size)
    return F.conv2d(F.conv2d(x_BCHW, kernel, groups=channels), kernel.mT, groups=channels)


def sobel(x_BCHW: Tensor, *, border: str = "replicate") -> Tensor:
    """Sobel's gradients along width and height, (B, C, 2, H, W): sums of differences with weights 1, 2, 1.

    A step of 1 gives 4; an eighth of it is the slope per pixel.

    Args:
        x_BCHW: images.
        border: what goes on past it, a mode of `F.pad`.

    >>> sobel(torch.arange(3.0).expand(1, 1, 3, 3))[0, 0, :, 1, 1].tolist()
    [8.0, 0.0]
    """
    with at_home(x_BCHW):
        along = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=x_BCHW.device, dtype=x_BCHW.dtype)
    B, C, H, W = x_BCHW.shape
    padded = F.pad(x_BCHW.reshape(B * C, 1, H, W), [1] * 4, mode=border)
    return F.conv2d(padded, torch.stack([along, along.mT])[:, None]).view(B, C, 2, H, W)


def ssim_terms(
    a_BCHW: Tensor, b_BCHW: Tensor, window: Tensor, *, data_range: float | Tensor = 1.0, border: str = "valid"
) -> tuple[Tensor, Tensor]:
    """The two factors of SSIM at each pixel: luminance, and contrast with structure.

    Args:
        a_BCHW, b_BCHW: images of one shape.
        window, border: see `smooth`.
        data_range: L, the largest value less the smallest that a pixel can have.

    Raises:
        ValueError: if the images differ in shape, are too small, or the data range is not positive.
    """
    if a_BCHW.shape != b_BCHW.shape:
        raise ValueError(f"images must have one shape, got {tuple(a_BCHW.shape)} and {tuple(b_BCHW.shape)}")
    if not isinstance(data_range, Tensor) and data_range <= 0:
        raise ValueError(f"data_range must be positive, got {data_range}")
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    moments = torch.cat([a_BCHW, b_BCHW, a_BCHW * a_BCHW, b_BCHW * b_BCHW, a_BCHW * b_BCHW])
    mean_a, mean_b, square_a, square_b, product = smooth(moments, window, border).chunk(5)
    squares = mean_a.square() + mean_b.square()
    luminance = (2 * mean_a * mean_b + c1) / (squares + c1)
    contrast = (2 * (product - mean_a * mean_b) + c2) / (square_a + square_b - squares + c2)
    return luminance, contrast


def ssim(
    a_BCHW: Tensor,
    b_BCHW: Tensor,
    *,
    size: int = 11,
    sigma: float = 1.5,
    data_range: float | Tensor = 1.0,
    border: str = "valid",
) -> Tensor:
    """Structural similarity at each pixel, at most 1.

    Args:
        a_BCHW, b_BCHW, data_range: see `ssim_terms`.
        size, sigma: of the Gaussian window.
        border: see `smooth`.

    Raises:
        ValueError: as `ssim_terms`.

    >>> x = torch.rand(1, 1, 16, 16)
    >>> bool((ssim(x, x) - 1).abs().max() < 1e-5), ssim(x, x).shape
    (True, torch.Size([1, 1, 6, 6]))
    """
    luminance, contrast = ssim_terms(a_BCHW, b_BCHW, gaussian(size, sigma), data_range=data_range, border=border)
    return luminance * contrast
