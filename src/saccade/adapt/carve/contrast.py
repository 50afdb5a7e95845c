"""Two maps of attention into one: what the question looks at, divided by what any instruction looks at.

Shape letters: T steps, L layers, n image tokens, H height and W width of an image in pixels, h and w of its grid, C
channels.
"""

from __future__ import annotations

import math
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need

TEMPORAL = ("all", "first", "last")


def contrasted(question: Tensor, general: Tensor, damping: float = 1e-8) -> Tensor:
    """A_Q / (A_G + lambda), which minimises sum (A A_G - A_Q)^2 + lambda sum A^2 A_G.

    Args:
        question: A_Q, attention of the question to the image tokens, of any shape.
        general: A_G, that of a general instruction, of the same shape.
        damping: lambda, above 0.
    """
    return question / (general + damping)


def fused(
    question_TLn: Tensor,
    general_TLn: Tensor,
    grid: tuple[int, int],
    size: tuple[int, int],
    *,
    damping: float = 1e-8,
    temporal: str = "all",
) -> Tensor:
    """S (H, W), fp64: contrasted maps of all layers and steps, later steps weighing more, at the image's size.

        S = sum_t w_t sum_l resize(A_Q / (A_G + lambda)),     w_t = 1, 2, ...

    Args:
        question_TLn: A_Q, of each step and layer.
        general_TLn: A_G; steps that only one of the two has are left out.
        grid: h and w; of more tokens than h w the rest is cut.
        size: H and W.
        damping: lambda.
        temporal: "all" steps, the "first" alone or the "last" alone.
    """
    steps = min(len(question_TLn), len(general_TLn))
    question, general = question_TLn[:steps].double(), general_TLn[:steps].double()
    weight_T = torch.arange(1, steps + 1, device=question.device, dtype=torch.float64)
    if temporal != "all":
        weight_T = (weight_T == (1 if temporal == "first" else steps)).double()
    map_n = (contrasted(question, general, damping).sum(1) * weight_T[:, None]).sum(0)
    return resized(map_n[: grid[0] * grid[1]].view(1, *grid), size)[0]


def resized(x_CHW: Tensor, size: tuple[int, int]) -> Tensor:
    """Linear interpolation between pixels' centres, over all that a pixel covers where it shrinks.

    Args:
        x_CHW: an image, or maps.
        size: the new height and width.
    """
    return F.interpolate(x_CHW[None], size, mode="bilinear", antialias=True)[0]


def grid_of(tokens: int, grid: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of an image's tokens: as given, else a square.

    Args:
        tokens: n.
        grid: h and w, where they are known.

    Raises:
        ValueError: if the tokens do not fill the grid, or are no square.
    """
    side = isqrt(tokens)
    if grid is None and side * side == tokens:
        return side, side
    if grid is None or grid[0] * grid[1] > tokens or min(grid) < 1:
        raise ValueError(f"grid must be the rows and columns of {tokens} image tokens, got {grid}")
    return grid


def attention_entropy(attention_Ln: Tensor) -> Tensor:
    """Mean over layers of -sum a ln a: how scattered attention over the image is; ln n where it is uniform.

    Args:
        attention_Ln: of each layer; brought to sum 1.
    """
    a = attention_Ln / attention_Ln.sum(-1, keepdim=True).clamp_min(torch.finfo(attention_Ln.dtype).tiny)
    return -torch.xlogy(a, a).sum(-1).mean(-1)


def colour_complexity(image_3HW: Tensor, bins: int = 180) -> float:
    """-(1 / ln B) sum rho ln rho over the histogram rho of hues: 0 of one hue, 1 of all alike.

    Args:
        image_3HW: in [0, 1].
        bins: B.
    """
    r, g, b = image_3HW.double()
    most, least = image_3HW.double().amax(0), image_3HW.double().amin(0)
    span = (most - least).clamp_min(1e-12)
    sixth = torch.where(most == r, ((g - b) / span) % 6, torch.where(most == g, (b - r) / span + 2, (r - g) / span + 4))
    hue = torch.where(most == least, torch.zeros_like(sixth), sixth) / 6
    rho = torch.bincount((hue.flatten() * bins).round().long() % bins, minlength=bins).double()
    rho = rho / rho.sum()
    return float(-torch.xlogy(rho, rho).sum() / math.log(bins)) + 0.0


def texture_complexity(image_3HW: Tensor, sigma: float = 1.0) -> float:
    """The share of pixels that are edges, as Canny finds them in the grey image: 0 where all is alike.

    Args:
        image_3HW: in [0, 1].
        sigma: deviation of the blur before.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    feature = need("skimage.feature", "texture_complexity")
    grey = image_3HW.double().cpu().mul(torch.tensor([0.299, 0.587, 0.114]).double()[:, None, None]).sum(0)
    return float(feature.canny(grey.numpy(), sigma=sigma).mean())
