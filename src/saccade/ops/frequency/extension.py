"""What a signal x_0 .. x_{n-1} is beyond its ends, in PyWavelets' words.

| name        | before and after a b c d            |
|-------------|-------------------------------------|
| `zero`      | 0 0 0 0  ǀ  a b c d  ǀ  0 0 0 0     |
| `constant`  | a a a a  ǀ  a b c d  ǀ  d d d d     |
| `symmetric` | d c b a  ǀ  a b c d  ǀ  d c b a     |
| `reflect`   | . d c b  ǀ  a b c d  ǀ  c b a .     |
| `periodic`  | a b c d  ǀ  a b c d  ǀ  a b c d     |

Unlike `F.pad`, an extension may be any number of times as long as the signal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EXTENSIONS", "check_extension", "extend"]

EXTENSIONS = ("zero", "constant", "symmetric", "reflect", "periodic")


def check_extension(mode: str, among: tuple[str, ...] = EXTENSIONS) -> None:
    """Raise ValueError unless `mode` is one of the names."""
    if mode not in among:
        raise ValueError(f"mode must be one of {', '.join(among)}, got {mode!r}")


def extend(x: Tensor, before: int, after: int, axis: int = -1, mode: str = "symmetric") -> Tensor:
    """The signal with `before` values more at its beginning and `after` more at its end.

    Args:
        x: of any shape, with a value at least along the axis.
        before, after: how many values are added; not negative.
        axis: along which.
        mode: of `EXTENSIONS`.

    Raises:
        ValueError: if the mode is unknown or the axis is empty.

    >>> extend(torch.tensor([1, 2, 3]), 2, 4).tolist()
    [2, 1, 1, 2, 3, 3, 2, 1, 1]
    """
    check_extension(mode)
    length = x.shape[axis]
    if length < 1:
        raise ValueError(f"axis {axis} must have a value at least, got shape {tuple(x.shape)}")
    if mode == "zero":
        return F.pad(x.movedim(axis, -1), (before, after)).movedim(-1, axis)
    return x.index_select(axis, _places(length, before, after, mode, x.device))


def _places(length: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """For each place of the extended signal, the place of its value in the signal."""
    place = torch.arange(-before, length + after, device=device)
    if mode == "constant" or length == 1:
        return place.clamp(0, length - 1)
    if mode == "periodic":
        return place % length
    period = 2 * length if mode == "symmetric" else 2 * length - 2
    place = place % period
    mirrored = (period - 1 if mode == "symmetric" else period) - place
    return torch.minimum(place, mirrored)
