"""Where in the image the prompt is: relevance of patches, heat of pixels, and what stays of the image.

Shape letters: B images, H heads, T tokens of the prompt, G side of the map of patches, M = 1 + G^2 keys, S side of the
image, C channels, P patches.
"""

from __future__ import annotations

from functools import lru_cache
from math import isqrt

import torch
from torch import Tensor


def token_relevance(attention_BHTM: Tensor, gradient_BHTM: Tensor, mask_BT: Tensor) -> Tensor:
    """The map of each token, (B, T, G, G): the mean over heads of C max(0, dL / dC), 0 where a token is padding.

    Args:
        attention_BHTM: cross attention C of a layer of the matching model; its first key is the class token.
        gradient_BHTM: of the sum L of the logits that say "match".
        mask_BT: 1 where a token is real.

    Raises:
        ValueError: if there are not 1 + G^2 keys.
    """
    side = isqrt(attention_BHTM.shape[-1] - 1)
    if side * side + 1 != attention_BHTM.shape[-1] or attention_BHTM.shape != gradient_BHTM.shape:
        raise ValueError(
            "attention and its gradient must be (batch, heads, tokens, 1 + side^2), got "
            f"{tuple(attention_BHTM.shape)} and {tuple(gradient_BHTM.shape)}"
        )
    real_B1T1 = mask_BT[:, None, :, None].to(attention_BHTM.dtype)
    grown = (attention_BHTM * real_B1T1 * (gradient_BHTM * real_B1T1).clamp_min(0))[..., 1:].mean(1)
    return grown.unflatten(-1, (side, side))


def relevance(attention_BHTM: Tensor, gradient_BHTM: Tensor, mask_BT: Tensor) -> Tensor:
    """cor (B, G, G): the mean of `token_relevance` over the prompt's tokens, without its first and its last.

    Args:
        attention_BHTM, gradient_BHTM, mask_BT: as for `token_relevance`.
    """
    maps_BTGG = token_relevance(attention_BHTM, gradient_BHTM, mask_BT)
    count_B1 = (mask_BT.sum(1, keepdim=True) - 2).clamp_min(0)
    place_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    prompt_BT = (place_T >= 1) & (place_T <= count_B1)
    summed = (maps_BTGG * prompt_BT[..., None, None].to(maps_BTGG.dtype)).sum(1)
    return summed / count_B1[..., None].clamp_min(1).to(maps_BTGG.dtype)


def heat_map(relevance_BGG: Tensor, size: int, sigma: float = 0.02) -> Tensor:
    """Heat (B, S, S) in [0, 1], fp64: the map stretched, enlarged by cubic splines and clipped, blurred, stretched.

    Args:
        relevance_BGG: of the patches.
        size: S, at least G.
        sigma: deviation of the blur, in S.

    Raises:
        ValueError: if the size is less than G.
    """
    side = relevance_BGG.shape[-1]
    if size < side:
        raise ValueError(f"size must be at least that of the map of patches ({side}), got {size}")
    grow, blur = (matrix.to(relevance_BGG.device) for matrix in (spline_matrix(side, size), blur_matrix(size, sigma)))
    coarse = _stretched(relevance_BGG.double())
    return _stretched(blur @ (grow @ coarse @ grow.T).clamp(0, 1) @ blur.T)


def keep_mask(heat_BSS: Tensor, similarity_B: Tensor, divisor: float = 2.0) -> Tensor:
    """1 where a pixel stays, 0 for about similarity / divisor of them, the coolest: a better match hides more.

    The threshold is number int(S^2 r) of the pixels from the hottest on, r = min(1 - similarity / divisor, 1 - 1e-5).

    Args:
        heat_BSS: of the pixels.
        similarity_B: cosine of image and prompt.
        divisor: of the share that is hidden.
    """
    ratio = (1 - similarity_B.double() / divisor).clamp(0, 1 - 1e-5)
    place_B1 = (heat_BSS[0].numel() * ratio).long()[:, None]
    sorted_BP = heat_BSS.flatten(1).sort(descending=True).values
    return (heat_BSS >= sorted_BP.gather(1, place_B1)[..., None]).to(heat_BSS.dtype)


@lru_cache(maxsize=16)
def spline_matrix(side: int, size: int) -> Tensor:
    """(S, G), fp64: cubic spline interpolation to pixels' areas, of a map around which there are zeros.

    Args:
        side: G.
        size: S.
    """
    margin = 12  # beyond which nothing is felt: 0.27^12 < 1e-6
    with torch.device("cpu"), torch.inference_mode(False):
        count = side + 2 * margin
        basis = torch.eye(count, dtype=torch.float64) * 4 / 6
        for shift in (1, -1):
            basis += torch.diag(torch.full((count - 1,), 1 / 6, dtype=torch.float64), shift)
        basis[0, 1] = basis[-1, -2] = 2 / 6
        at = (torch.arange(size, dtype=torch.float64) + 0.5) * side / size - 0.5 + margin
        distance = (at[:, None] - torch.arange(count, dtype=torch.float64)).abs()
        near = 2 / 3 - distance.square() + distance**3 / 2
        far = (2 - distance).clamp_min(0) ** 3 / 6
        return (torch.where(distance < 1, near, far) @ torch.linalg.inv(basis))[:, margin : margin + side].contiguous()


@lru_cache(maxsize=16)
def blur_matrix(size: int, sigma: float) -> Tensor:
    """(S, S), fp64: a Gaussian of deviation sigma S, cut at four of them; beyond an edge the image is seen mirrored.

    Args:
        size: S.
        sigma: in S.
    """
    with torch.device("cpu"), torch.inference_mode(False):
        deviation = sigma * size
        radius = int(4 * deviation + 0.5)
        offset = torch.arange(-radius, radius + 1)
        weight = torch.exp(-0.5 * (offset.double() / max(deviation, 1e-12)) ** 2)
        place = (torch.arange(size)[:, None] + offset) % (2 * size)
        place = torch.where(place >= size, 2 * size - 1 - place, place)
        return torch.zeros(size, size, dtype=torch.float64).scatter_add_(
            1, place, (weight / weight.sum()).expand(size, -1).contiguous()
        )


def _stretched(x_BSS: Tensor) -> Tensor:
    """Less its least, and divided by its largest where that is not 0."""
    x = x_BSS - x_BSS.amin((1, 2), keepdim=True)
    largest = x.amax((1, 2), keepdim=True)
    return x / torch.where(largest > 0, largest, torch.ones_like(largest))
