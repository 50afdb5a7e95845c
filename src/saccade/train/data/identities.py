"""Things that are recognised again, faces and handwritten digits, in several degraded views.

| condition | a view of it | at its worst |
|---|---|---|
| `blurred` | a lens out of focus | a deviation of a tenth of the side |
| `noisy` | independent noise on each pixel | a deviation of 0.6, where white is 1 |
| `coarse` | few pixels, scaled up | an eighth of the side |
| `dark` | little light, and the noise of the sensor | a tenth of the light |

How bad a view is, is drawn for each, so that a set of views holds good ones and bad ones; each is also turned, scaled
and moved a little. All that is random comes from a `torch.Generator`.

Shape letters: B things, V views of each, N images, S side, H height, W width of a picture, or taps of a window.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need

CONDITIONS = ("blurred", "noisy", "coarse", "dark")
#: of scikit-image's pictures those that are faces
_FACES = 100
#: the worst of each: deviation over side, deviation, side, light; and the sensor's noise
_BLUR, _NOISE, _COARSE, _DARK, _SENSOR = 0.1, 0.6, 1 / 8, 0.1, 0.05
#: turn in radians, share of scale, share of the side: at most
_TURN, _SCALE, _MOVE = 0.25, 0.1, 0.08


@cache
def faces() -> Tensor:
    """100 grey faces, each of another person, (100, 1, 25, 25) in [0, 1]: scikit-image's part of LFW.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    images = need("skimage.data", "the task of identities").lfw_subset()[:_FACES]
    return torch.as_tensor(images.copy()).float()[:, None]


def scaled(images_N1HW: Tensor, side: int) -> Tensor:
    """(N, 1, S, S), of any size before.

    Args:
        images_N1HW: in [0, 1].
        side: S.
    """
    size = [side, side]
    return F.interpolate(images_N1HW, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def degraded(clear_B1SS: Tensor, condition_B: Tensor, views: int, generator: torch.Generator) -> Tensor:
    """Views (B, V, 1, S, S) in [0, 1] of each thing, all under one condition.

    Args:
        clear_B1SS: the things in [0, 1].
        condition_B: a number of `CONDITIONS` for each.
        views: V.
        generator: of all that is drawn.

    Raises:
        ValueError: if a condition is none of these.
    """
    if condition_B.numel() and not 0 <= int(condition_B.min()) <= int(condition_B.max()) < len(CONDITIONS):
        raise ValueError(f"condition must be from 0 to {len(CONDITIONS) - 1}, got {condition_B.tolist()}")
    image_N1SS = _moved(clear_B1SS.repeat_interleave(views, 0), generator)
    condition_N = condition_B.repeat_interleave(views)
    worse_N = torch.rand(len(image_N1SS), generator=generator)
    noise_N1SS = torch.randn(image_N1SS.shape, generator=generator)
    out_N1SS = image_N1SS.clone()
    for number, degrade in enumerate((_blurred, _noisy, _coarse, _dark)):
        chosen = condition_N == number
        if chosen.any():
            out_N1SS[chosen] = degrade(image_N1SS[chosen], worse_N[chosen], noise_N1SS[chosen])
    return out_N1SS.clamp(0, 1).unflatten(0, (-1, views))


def _moved(image_N1SS: Tensor, generator: torch.Generator) -> Tensor:
    turn, scale, right, down = 2 * torch.rand(4, len(image_N1SS), generator=generator) - 1
    turn, scale = _TURN * turn, 1 + _SCALE * scale
    cos, sin = scale * turn.cos(), scale * turn.sin()
    theta_N23 = torch.stack([cos, -sin, 2 * _MOVE * right, sin, cos, 2 * _MOVE * down], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta_N23, list(image_N1SS.shape), align_corners=False)
    return F.grid_sample(image_N1SS, grid, padding_mode="border", align_corners=False)


def _blurred(image_N1SS: Tensor, worse_N: Tensor, noise_N1SS: Tensor) -> Tensor:
    """Each under a window of its own, along rows and columns."""
    count, side = len(image_N1SS), image_N1SS.shape[2]
    reach = math.ceil(3 * _BLUR * side)
    sigma_N1 = (_BLUR * side * worse_N[:, None]).clamp(min=1e-2)
    window_NW = (-(torch.arange(-reach, reach + 1) / sigma_N1).square() / 2).exp()
    window_NW = window_NW / window_NW.sum(1, keepdim=True)
    x_1NSS = F.pad(image_N1SS[:, 0][None], (reach,) * 4, mode="replicate")
    x_1NSS = F.conv2d(x_1NSS, window_NW[:, None, None], groups=count)
    return F.conv2d(x_1NSS, window_NW[:, None, :, None], groups=count)[0][:, None]


def _noisy(image_N1SS: Tensor, worse_N: Tensor, noise_N1SS: Tensor) -> Tensor:
    return image_N1SS + _NOISE * worse_N.view(-1, 1, 1, 1) * noise_N1SS


def _coarse(image_N1SS: Tensor, worse_N: Tensor, noise_N1SS: Tensor) -> Tensor:
    side, found = image_N1SS.shape[2], []
    for image, worse in zip(image_N1SS[:, None], worse_N.tolist()):
        size = [max(1, round(side * _COARSE**worse))] * 2
        few = F.interpolate(image, size, mode="area")
        found.append(F.interpolate(few, [side, side], mode="bilinear", align_corners=False))
    return torch.cat(found)


def _dark(image_N1SS: Tensor, worse_N: Tensor, noise_N1SS: Tensor) -> Tensor:
    return image_N1SS * _DARK ** worse_N.view(-1, 1, 1, 1) + _SENSOR * noise_N1SS
