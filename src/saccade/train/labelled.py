"""Pictures with a label for every pixel, from what scikit-image carries in itself, and generated ones.

| name | what | labels are |
|---|---|---|
| `coins` | Greek coins on grey | watershed of the gradient between surely coin and surely background, filled |
| `cells` | tissue (immunohistochemistry), its brown cells | brown stain above Otsu's threshold, nuclei filled in |
| `vessels` | the vessels of a retina | Sato's ridge filter of the green channel, with hysteresis |
| `shapes` | discs, squares, triangles and crosses in front of a photograph, with their depth | as drawn |
| `volumes` | noisy volumes with an ellipsoid, of which a part carries a fine texture | as drawn |

The labels of the first three are made by classical filters from the picture at its full size: what a network can learn
there is what these find, from a window. They need scikit-image (the extra `saccade[data]`). All that is random comes
from a `torch.Generator`.

Shape letters: B batch, C channels, S side, H height, W width, D depth, P shapes of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.extras import need
from saccade.train.data import crops

#: the shapes there are, numbered from 1 in labels
SHAPES = ("disc", "square", "triangle", "cross")


class Scenes(NamedTuple):
    """Shapes in front of photographs.

    Attributes:
        images: (B, 3, S, S) in [0, 1].
        depths: (B, 1, S, S) in [0, 1], near is 1.
        labels: (B, S, S); 0 is background, else the number of the shape in `SHAPES`, from 1.
    """

    images: Tensor
    depths: Tensor
    labels: Tensor


@cache
def coins() -> tuple[Tensor, Tensor]:
    """The photograph (3, 303, 384) in [0, 1], grey, and its labels (303, 384): 1 on coins.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    data, filters, segmentation, ndimage = _tools("data", "filters", "segmentation")
    image_HW = data.coins()
    markers_HW = (image_HW < 30) * 1 + (image_HW > 150) * 2
    filled_HW = ndimage.binary_fill_holes(segmentation.watershed(filters.sobel(image_HW), markers_HW) == 2)
    kept_HW = ndimage.binary_opening(filled_HW, iterations=3)
    grey_HW = torch.as_tensor(image_HW.copy()).float() / 255
    return grey_HW.expand(3, -1, -1).contiguous(), torch.as_tensor(kept_HW).long()


@cache
def cells() -> tuple[Tensor, Tensor]:
    """The tissue (3, 512, 512) in [0, 1] and its labels (512, 512): 1 on the cells stained brown, nuclei and all.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    data, filters, color, morphology, _ = _tools("data", "filters", "color", "morphology")
    image_HWC = data.immunohistochemistry()
    brown_HW = filters.gaussian(color.rgb2hed(image_HWC)[..., 2], 1.5)
    found_HW = morphology.remove_small_holes(brown_HW > filters.threshold_otsu(brown_HW), max_size=300)
    kept_HW = morphology.remove_small_objects(found_HW, max_size=300)
    return torch.as_tensor(image_HWC.copy()).permute(2, 0, 1).float() / 255, torch.as_tensor(kept_HW).long()


@cache
def vessels() -> tuple[Tensor, Tensor]:
    """The retina at a third of its size, (3, 470, 470) in [0, 1], and its labels (470, 470): 1 on vessels.

    Raises:
        ImportError: if scikit-image is not installed.
    """
    data, filters, morphology, ndimage = _tools("data", "filters", "morphology")
    image_CHW = torch.as_tensor(data.retina().copy()).permute(2, 0, 1).float() / 255
    image_CHW = F.avg_pool2d(image_CHW, 3)
    green_HW = image_CHW[1].numpy()
    eye_HW = ndimage.binary_erosion(green_HW > 0.08, iterations=10)
    ridge_HW = filters.sato(green_HW, sigmas=(1, 1.5, 2.5), black_ridges=True) * eye_HW
    level = filters.threshold_otsu(ridge_HW[eye_HW])
    found_HW = filters.apply_hysteresis_threshold(ridge_HW, 0.7 * level, 1.5 * level)
    kept_HW = morphology.remove_small_objects(found_HW, max_size=40)
    return image_CHW, torch.as_tensor(kept_HW).long()


def _tools(*names: str) -> tuple[Any, ...]:
    """Modules of scikit-image, and scipy's of images behind them."""
    what = "the task of labelled photographs"
    return (*(need(f"skimage.{name}", what) for name in names), need("scipy.ndimage", what))


def shapes(
    count: int, side: int, generator: torch.Generator, photographs: Sequence[Tensor], *, most: int = 3
) -> Scenes:
    """Scenes of one to `most` shapes, each filled with another window of the photographs, nearer than what is behind.

    Colour alone does not tell a shape: it is made of the same photographs, only brighter or darker by up to a quarter.

    Args:
        count: B.
        side: S.
        generator: of all that is random.
        photographs: (3, H, W) in [0, 1], at least as large as a window.
        most: shapes of a scene.

    Raises:
        ValueError: if a window does not fit.
    """
    pictures = [(photograph,) for photograph in photographs]
    behind_BCSS, filling_BCSS = (crops(pictures, count, side, generator, turned=True)[0] for _ in range(2))

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    kind_BP = torch.randint(len(SHAPES), (count, most), generator=generator)
    there_BP = torch.arange(most) < torch.randint(1, most + 1, (count, 1), generator=generator)
    inside_BPSS = drawn(
        kind_BP, uniform(0.1, 0.9, count, most, 2) * side, uniform(0.1, 0.28, count, most) * side,
        uniform(0, torch.pi, count, most), side,
    ) & there_BP[..., None, None]  # fmt: skip
    light_BP, near_BP = uniform(-0.25, 0.25, count, most), uniform(0.6, 1, count, most)

    slope_B2 = uniform(-0.15, 0.15, count, 2)
    line_S = torch.linspace(-1, 1, side)
    depth_BSS = 0.3 + slope_B2[:, :1, None] * line_S[:, None] + slope_B2[:, 1:, None] * line_S
    image_BCSS, label_BSS = behind_BCSS, torch.zeros(count, side, side, dtype=torch.long)
    for p in range(most):  # the later ones lie in front
        here_BSS = inside_BPSS[:, p]
        front_BCSS = (filling_BCSS + light_BP[:, p, None, None, None]).clamp(0, 1)
        image_BCSS = torch.where(here_BSS[:, None], front_BCSS, image_BCSS)
        depth_BSS = torch.where(here_BSS, near_BP[:, p, None, None], depth_BSS)
        label_BSS = torch.where(here_BSS, kind_BP[:, p, None, None] + 1, label_BSS)
    depth_BSS = depth_BSS + 0.02 * torch.randn(depth_BSS.shape, generator=generator)
    return Scenes(image_BCSS, depth_BSS.clamp(0, 1)[:, None], label_BSS)


def drawn(kind_BP: Tensor, centre_BP2: Tensor, radius_BP: Tensor, angle_BP: Tensor, side: int) -> Tensor:
    """Where shapes lie, bool (B, P, S, S).

    Args:
        kind_BP: numbers in `SHAPES`, from 0.
        centre_BP2: row and column, in pixels.
        radius_BP: from the centre to the farthest edge or corner, in pixels.
        angle_BP: by which they are turned.
        side: S.
    """
    line_S = torch.arange(side) + 0.5
    row_BPSS = (line_S[:, None] - centre_BP2[..., 0, None, None]) / radius_BP[..., None, None]
    column_BPSS = (line_S - centre_BP2[..., 1, None, None]) / radius_BP[..., None, None]
    sine, cosine = angle_BP.sin()[..., None, None], angle_BP.cos()[..., None, None]
    u_BPSS, v_BPSS = cosine * row_BPSS + sine * column_BPSS, cosine * column_BPSS - sine * row_BPSS
    wide, narrow = torch.maximum(u_BPSS.abs(), v_BPSS.abs()), torch.minimum(u_BPSS.abs(), v_BPSS.abs())
    every = torch.stack(
        [
            u_BPSS.square() + v_BPSS.square() <= 1,
            wide <= 0.5**0.5,
            (u_BPSS >= -0.5) & (u_BPSS + 3**0.5 * v_BPSS.abs() <= 1),
            (wide <= 0.95) & (narrow <= 0.3),
        ]
    )
    return every.gather(0, kind_BP[None, ..., None, None].expand(1, *u_BPSS.shape))[0]


def volumes(
    count: int, side: int, generator: torch.Generator, *, channels: int = 4, noise: float = 0.3
) -> tuple[Tensor, Tensor]:
    """Volumes (B, C, S, S, S) about 0 and their labels (B, S, S, S): 1 in an ellipsoid, 2 in its textured half.

    The ellipsoid is brighter by 1 in every channel, times a factor of the channel's own; stripes two voxels wide, one
    way in all volumes, add or take half of that in the half on one side of a plane through its centre.

    Args:
        count: B.
        side: S, at least 8.
        generator: of all that is random.
        channels: C.
        noise: standard deviation of what is added to every voxel.

    Raises:
        ValueError: if a number is out of range.
    """
    if count < 1 or side < 8 or channels < 1 or noise < 0:
        raise ValueError(
            f"count and channels must be positive, side at least 8 and noise not negative, got {count}, {channels}, "
            f"{side} and {noise}"
        )
    centre_B3 = (0.4 + 0.2 * torch.rand(count, 3, generator=generator)) * side
    radius_B3 = (0.2 + 0.15 * torch.rand(count, 3, generator=generator)) * side
    line_S = torch.arange(side) + 0.5
    offsets = [
        ((line_S - centre_B3[:, axis, None]) / radius_B3[:, axis, None]).reshape(count, *shape)
        for axis, shape in enumerate(((side, 1, 1), (1, side, 1), (1, 1, side)))
    ]
    down, across, behind = offsets
    inside_BDHW = down.square() + across.square() + behind.square() <= 1
    normal_B3 = torch.randn(count, 3, generator=generator)
    along = [normal_B3[:, axis, None, None, None] * offset for axis, offset in enumerate(offsets)]
    half_BDHW = along[0] + along[1] + along[2] > 0
    label_BDHW = inside_BDHW.long() + (inside_BDHW & half_BDHW)
    stripes_HW = ((torch.arange(side)[:, None] + torch.arange(side)) // 2 % 2).float() - 0.5
    bright_BDHW = inside_BDHW + stripes_HW * (label_BDHW == 2)
    factor_BC = 0.5 + torch.rand(count, channels, generator=generator)
    volume_BCDHW = factor_BC[..., None, None, None] * bright_BDHW[:, None]
    return volume_BCDHW + noise * torch.randn(volume_BCDHW.shape, generator=generator), label_BDHW
