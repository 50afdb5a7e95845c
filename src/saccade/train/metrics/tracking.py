"""How well points are followed through a video: TAP-Vid's three measures (Doersch et al., arXiv 2211.03726).

| score | what |
|---|---|
| `delta_avg` | the share of seen points that are found within 1, 2, 4, 8 and 16 pixels, the mean of the five |
| `occlusion_accuracy` | the share of points of which it is said rightly whether they are seen |
| `average_jaccard` | found and said to be seen, over that with what is missed or said to be seen and not there |

    J_d = TP / (P + FP),    TP: seen, said to be seen, within d;   P: seen;   FP: said to be seen, hidden or beyond d

Pixels are those of frames of 256 x 256. A point counts in the frames after the one in which it was given ("first"), or
in all others ("strided"). Each score is taken of a video, and the mean over videos.

Shape letters: B videos, T frames, N points.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: pixels, in frames of this side
THRESHOLDS, SIDE = (1, 2, 4, 8, 16), 256
MODES = ("first", "strided")


def tap_vid(
    points_BTN2: Tensor,
    visible_BTN: Tensor,
    truth_BTN2: Tensor,
    seen_BTN: Tensor,
    starts_BN: Tensor,
    *,
    mode: str = "first",
) -> dict[str, float]:
    """The three scores, from 0 to 1, as `average_jaccard`, `delta_avg`, `occlusion_accuracy`.

    Args:
        points_BTN2: where they are said to be, (x, y) from 0 to 1.
        visible_BTN: bool, whether they are said to be seen.
        truth_BTN2, seen_BTN: where they are, and whether they are seen.
        starts_BN: the frame in which each was given.
        mode: of `MODES`.

    Raises:
        ValueError: if shapes differ, the mode is unknown, or there is nothing to be judged.

    >>> truth = torch.tensor([[[[0.5, 0.5]], [[0.5, 0.5]], [[0.5, 0.5]]]])
    >>> said, seen = truth + torch.tensor([0, 0, 3 / 256])[:, None, None], torch.ones(1, 3, 1, dtype=torch.bool)
    >>> tap_vid(said, seen, truth, seen, torch.zeros(1, 1).long())["delta_avg"]  # the second is 4.2 pixels away
    0.7
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    B, T, N = visible_BTN.shape
    shapes = [tuple(x.shape) for x in (points_BTN2, truth_BTN2, seen_BTN, starts_BN)]
    if shapes != [(B, T, N, 2), (B, T, N, 2), (B, T, N), (B, N)]:
        raise ValueError(f"points, truth, seen and starts must fit visible {(B, T, N)}, got {shapes}")
    frame_T11 = torch.arange(T, device=starts_BN.device)[:, None]
    counts_BTN = frame_T11 > starts_BN[:, None] if mode == "first" else frame_T11 != starts_BN[:, None]
    if not counts_BTN.flatten(1).any(1).all():
        raise ValueError("each video must have a frame beside those in which its points were given")
    seen_BTN, visible_BTN = seen_BTN & counts_BTN, visible_BTN & counts_BTN
    rightly_BTN = (seen_BTN == visible_BTN) & counts_BTN
    far_BTN = (points_BTN2 - truth_BTN2).double().norm(dim=-1) * SIDE
    within, jaccard = [], []
    for threshold in THRESHOLDS:
        near_BTN = far_BTN < threshold
        within.append(_share(near_BTN & seen_BTN, seen_BTN))
        hits = (near_BTN & seen_BTN & visible_BTN).flatten(1).sum(1)
        false = (visible_BTN & ~(near_BTN & seen_BTN)).flatten(1).sum(1)
        jaccard.append(hits / (seen_BTN.flatten(1).sum(1) + false).clamp(min=1))
    return {
        "average_jaccard": float(torch.stack(jaccard).double().mean()),
        "delta_avg": float(torch.stack(within).mean()),
        "occlusion_accuracy": float(_share(rightly_BTN, counts_BTN).mean()),
    }


def _share(part_BTN: Tensor, of_BTN: Tensor) -> Tensor:
    """Of each video."""
    return part_BTN.flatten(1).sum(1).double() / of_BTN.flatten(1).sum(1).clamp(min=1)
