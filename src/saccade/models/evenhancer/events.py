"""Events: the changes of brightness that a camera without frames reports one by one, as the network sees them.

Shape letters: N events, F frames of a simulation, E intervals, H height, W width.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from saccade.models.arrays import read_array


def voxels(events_N4: Tensor, bins: int, height: int, width: int) -> Tensor:
    """Events as maps of moments, (bins, H, W): each event's sign goes to the two moments that it lies between.

    Args:
        events_N4: time, x, y and polarity (positive, or not) of each, in any order; the first lies at the first
            moment and the last one at the last.
        bins: moments, two or more.
        height, width: of the camera.

    Raises:
        ValueError: if the shape is another, or events lie outside.
    """
    if events_N4.ndim != 2 or events_N4.shape[1] != 4 or bins < 2:
        raise ValueError(f"events must be (number, 4) and bins at least 2, got {tuple(events_N4.shape)} and {bins}")
    grid = torch.zeros(bins, height, width, device=events_N4.device)
    if not len(events_N4):
        return grid
    time, x, y, polarity = events_N4.unbind(1)
    if min(x.min(), y.min()) < 0 or x.max() >= width or y.max() >= height:
        raise ValueError(f"events must lie in {width} x {height} pixels, got x to {x.max():g} and y to {y.max():g}")
    first, last = time.min(), time.max()
    at = (time - first) / (last - first).clamp(min=1e-12) * (bins - 1)
    low = at.floor().clamp(max=bins - 2)
    sign = torch.where(polarity > 0, 1.0, -1.0)
    place = y.long() * width + x.long()
    for moment, weight in ((low, 1 - (at - low)), (low + 1, at - low)):
        grid.view(-1).index_add_(0, moment.long() * (height * width) + place, sign * weight.float())
    return grid


def intervals(voxels_HW: Tensor) -> Tensor:
    """Maps of E + 1 moments (..., E + 1, H, W) as those of E intervals (..., E, 2, H, W), each with its two moments."""
    return torch.stack([voxels_HW[..., :-1, :, :], voxels_HW[..., 1:, :, :]], -3)


def simulated(frames_FHW: Tensor, *, positive: float = 0.2, negative: float = 0.2) -> Tensor:
    """The events (N, 4) of a video, in [0, 1] of its time, as ESIM makes them, without a refractory time.

    A pixel reports whenever the logarithm of its brightness, linear between frames, has changed by a threshold since
    its last report.

    Args:
        frames_FHW: brightness in [0, 1], two frames or more, close in time.
        positive, negative: the thresholds.

    Raises:
        ValueError: if there are fewer frames or a threshold is not positive.
    """
    if frames_FHW.ndim != 3 or len(frames_FHW) < 2 or min(positive, negative) <= 0:
        raise ValueError(
            "frames must be (2 or more, height, width) and thresholds positive, got "
            f"{tuple(frames_FHW.shape)}, {positive} and {negative}"
        )
    levels = (frames_FHW + 1e-3).log()
    told = levels[0].clone()
    found = []
    for step, (before, after) in enumerate(zip(levels, levels[1:])):
        for sign, threshold in ((1.0, positive), (-1.0, negative)):
            crossings = ((sign * (after - told)) / threshold + 1e-6).floor().clamp(min=0)
            number = 1
            while (there := crossings >= number).any():
                y, x = there.nonzero(as_tuple=True)
                level = told[there] + sign * threshold * number
                share = ((level - before[there]) / (after - before)[there]).clamp(0, 1)
                time = (step + share) / (len(levels) - 1)
                found.append(torch.stack([time, x.float(), y.float(), torch.full_like(time, sign)], 1))
                number += 1
            told = told + sign * threshold * crossings
    return torch.cat(found) if found else frames_FHW.new_zeros(0, 4)


def read_events(path: str | Path, bins: int, height: int, width: int) -> Tensor:
    """The voxels (bins, H, W) of a `.npy` file of events (N, 4), or of voxels (bins, any height, any width).

    Args:
        path: of the file.
        bins: moments.
        height, width: of the camera, where the file holds events.

    Raises:
        OSError: if there is no such file, or it cannot be read.
        ValueError: if it holds something else.
    """
    found = read_array(path, "file of events", torch.float64)  # times may be microseconds since long ago
    if found.ndim == 3 and len(found) == bins:
        return found.float()
    if found.ndim == 2 and found.shape[1] == 4:
        return voxels(found, bins, height, width)
    raise ValueError(f"{path} must hold events (number, 4) or voxels ({bins}, height, width), got {tuple(found.shape)}")
