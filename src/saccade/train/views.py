"""Two registered views of one scene that each lost something: what there is to fuse, with the scene as it was.

| what was lost | infrared | visible | scene |
|---|---|---|---|
| `focus` | sharp on one side of a line, out of focus on the other | the other way round | the photograph |
| `exposure` | too short: no shadows | too long: no lights | the photograph |
| `thermal` | warm things, all else faint and out of focus | the photograph, darker, without them | it with them |

Shape letters: B batch, H height, W width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.structure import gaussian, smooth

LOST = ("focus", "exposure", "thermal")
#: the lens out of focus: side and deviation of its window in pixels
_BLUR = (13, 2.5)


class Views(NamedTuple):
    """Grey images (B, 1, H, W) in [0, 1].

    Attributes:
        infrared, visible: the two views.
        scene: what both show, with nothing lost.
    """

    infrared: Tensor
    visible: Tensor
    scene: Tensor


def registered_views(clear_B1HW: Tensor, generator: torch.Generator) -> Views:
    """Views of photographs, of `LOST` in turn.

    Args:
        clear_B1HW: grey photographs in [0, 1], of at least 8 pixels.
        generator: of the lines, exposures and warm things.
    """
    rows = [_VIEWS[LOST[i % len(LOST)]](clear, generator) for i, clear in enumerate(clear_B1HW[:, None])]
    return Views(*(torch.cat(alike) for alike in zip(*rows)))


def _focus(clear: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    blurred = smooth(clear, gaussian(*_BLUR), "reflect")
    x, y = _grid(clear)
    angle, offset = torch.rand(2, generator=generator)
    across = x * (2 * math.pi * angle).cos() + y * (2 * math.pi * angle).sin() - 0.4 * (offset - 0.5)
    side = (20 * across).sigmoid()
    return side * clear + (1 - side) * blurred, (1 - side) * clear + side * blurred, clear


def _exposure(clear: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    low, high = (0.3 + 0.2 * torch.rand(2, generator=generator)).tolist()
    return ((clear - low) / (1 - low)).clamp(0, 1), (clear / (1 - high)).clamp(0, 1), clear


def _thermal(clear: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, y = _grid(clear)
    warm = torch.zeros_like(clear)
    for _ in range(3):
        left, top, radius = torch.rand(3, generator=generator)
        distance = (x - 1.6 * (left - 0.5)).square() + (y - 1.6 * (top - 0.5)).square()
        warm = torch.maximum(warm, (40 * (0.12 + 0.15 * radius - distance.sqrt())).sigmoid())
    faint = 0.15 + 0.2 * smooth(clear, gaussian(*_BLUR), "reflect")
    dark = 0.8 * clear
    return (
        torch.lerp(faint, torch.ones_like(clear), 0.95 * warm),
        dark,
        torch.lerp(dark, torch.ones_like(clear), 0.6 * warm),
    )


def _grid(image_B1HW: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and rows from -1 to 1."""
    H, W = image_B1HW.shape[2:]
    return torch.linspace(-1, 1, W), torch.linspace(-1, 1, H)[:, None]


_VIEWS = {"focus": _focus, "exposure": _exposure, "thermal": _thermal}
