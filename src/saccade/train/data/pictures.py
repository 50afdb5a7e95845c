"""Digits, two noisy views of them, and photographs.

Shape letters: B batch, C channels, H, W picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.extras import need

#: what scikit-image carries in itself, so that it opens without a network; names of `skimage.data`
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "coins", "rocket")
#: of red, green and blue (ITU-R BT.709), as scikit-image's grey
_LUMINANCE = (0.2125, 0.7154, 0.0721)


class Digits(NamedTuple):
    """Images (B, 1, 8, 8) in steps of 1/16 from 0 to 1, and labels 0 to 9.

    Attributes:
        train_images, train_labels: four fifths of them.
        test_images, test_labels: the rest.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@cache
def digits() -> Digits:
    """scikit-learn's digits; a fixed fifth is the test set.

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    source = need("sklearn.datasets", "the task of digits").load_digits()
    images = torch.from_numpy(source.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(source.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(order) // 5], order[len(order) // 5 :]
    return Digits(images[train], labels[train], images[test], labels[test])


def photographs(*names: str, grey: bool = False) -> list[Tensor]:
    """scikit-image's photographs that open without a network, (C, H, W) in [0, 1], C = 3 or, of grey ones, 1.

    Args:
        names: functions of `skimage.data`: "astronaut", "camera", "chelsea", "coffee", "coins", "rocket" ...
        grey: make one channel of three, by the luminance of each.

    Raises:
        ImportError: if scikit-image is not installed.
        ValueError: if it has no photograph of that name in itself.
    """
    source = need("skimage.data", "the task of photographs")
    found = []
    for name in names:
        if name not in PHOTOGRAPHS:
            raise ValueError(f"photographs must be among {', '.join(PHOTOGRAPHS)}, got {name!r}")
        image_HWC = torch.as_tensor(getattr(source, name)().copy()).float() / 255
        image_CHW = image_HWC[None] if image_HWC.ndim == 2 else image_HWC[..., :3].permute(2, 0, 1)
        if grey and len(image_CHW) == 3:
            image_CHW = (image_CHW * torch.tensor(_LUMINANCE)[:, None, None]).sum(0, keepdim=True)
        found.append(image_CHW)
    return found


def crops(
    pictures: Sequence[Sequence[Tensor]],
    count: int,
    side: int,
    generator: torch.Generator,
    *,
    turned: bool = False,
    within: int | None = None,
) -> tuple[Tensor, ...]:
    """Square windows at random places of pictures.

    Args:
        pictures: of each picture the maps (..., H, W) that belong together, as an image and its labels; those after
            the first may be a whole number of times as large, and are cut at the same place.
        count: B.
        side: height and width, in pixels of the first map.
        generator: of pictures, places and turns.
        turned: also turn each window by 0, 90, 180 or 270 degrees.
        within: cut left of this column.

    Returns:
        for each map the windows (B, ..., side, side), or as many times larger.

    Raises:
        ValueError: if a window does not fit.
    """

    def below(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    windows = []
    for _ in range(count):
        maps = pictures[below(len(pictures)) if len(pictures) > 1 else 0]
        H, W = maps[0].shape[-2:]
        edge = W if within is None else min(W, within)
        if side > min(H, edge):
            raise ValueError(f"side must be at most {min(H, edge)}, got {side}")
        top, left = below(max(1, H - side)), below(max(1, edge - side))
        turns = below(4) if turned else 0
        windows.append([_window(one, one.shape[-2] // H, top, left, side).rot90(turns, (-2, -1)) for one in maps])
    return tuple(torch.stack(alike) for alike in zip(*windows))


def _window(map_HW: Tensor, times: int, top: int, left: int, side: int) -> Tensor:
    top, left, side = times * top, times * left, times * side
    return map_HW[..., top : top + side, left : left + side]


def recoloured(images_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Images with their colours in another order, and darker or brighter (gamma from 1/2 to 2): more to learn from.

    Args:
        images_B3HW: in [0, 1].
        generator: of both.
    """
    B = len(images_B3HW)
    order_B3 = torch.rand(B, 3, generator=generator).argsort(1)
    gamma_B = 2 ** (2 * torch.rand(B, generator=generator) - 1)
    return images_B3HW[torch.arange(B)[:, None], order_B3] ** gamma_B[:, None, None, None]


class Paired(NamedTuple):
    """Two views (B, 1, 8, 8) of the same digits, which of them are there (B, 2), and labels; a missing view is 0.

    Attributes:
        a, b: the views.
        present: bool, which of them are there.
        labels: 0 to 9.
    """

    a: Tensor
    b: Tensor
    present: Tensor
    labels: Tensor


def paired(
    batch: int | None,
    *,
    split: str = "train",
    noise: float = 0.5,
    missing: float = 0.25,
    generator: torch.Generator | None = None,
) -> Paired:
    """Two views of a digit, each with its own Gaussian noise; with probability `missing` one of the two is not there.

    Args:
        batch: how many, drawn with replacement; all of the split, in order, where None.
        split: "train" or "test".
        noise: standard deviation, where ink is 1.
        missing: probability that one of the two is not there.
        generator: of all that is drawn; torch's global one where None.

    Raises:
        ValueError: for arguments out of range.
        ImportError: if scikit-learn is not installed.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if noise < 0 or not 0 <= missing <= 1:
        raise ValueError(f"noise must not be negative and missing must be in [0, 1], got {noise} and {missing}")
    source = digits()
    images, labels = source[:2] if split == "train" else source[2:]
    if batch is not None:
        chosen = torch.randint(len(labels), (batch,), generator=generator)
        images, labels = images[chosen], labels[chosen]
    count = len(labels)
    views = [images + noise * torch.randn(images.shape, generator=generator) for _ in range(2)]
    gone = torch.rand(count, generator=generator) < missing
    which = torch.randint(2, (count,), generator=generator)
    present = torch.ones(count, 2, dtype=torch.bool)
    present[gone, which[gone]] = False
    a, b = (view * present[:, index, None, None, None] for index, view in enumerate(views))
    return Paired(a, b, present, labels)
