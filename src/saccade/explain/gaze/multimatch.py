"""MultiMatch: how alike two scanpaths are as saccades, in shape, direction, length, position and duration.

Scanpaths become arrows from fixation to fixation. Arrows of both are paired along the path through the table of their
differences, from the first pair to the last by steps right, down or both, on which the sum is least (Dijkstra). Of
the pairs on it, a figure is 1 less the median of

    shape |u - v| / (2 diagonal)     direction |angle| / pi     length ||u| - |v|| / diagonal
    position |start - start| / diagonal                         duration |d - e| / max(d, e)

Shape letters: N, M fixations of two scanpaths, P pairs of arrows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DIMENSIONS = ("shape", "direction", "length", "position", "duration")
#: of every fixation, in milliseconds, where a scanpath has no durations
DURATION_MS = 100.0


def multimatch(
    a_N: Tensor, b_M: Tensor, size: tuple[int, int], *, angle: float | None = None, amplitude: float = 0.0
) -> Tensor:
    """Five similarities in [0, 1], in the order of `DIMENSIONS`.

    Args:
        a_N, b_M: scanpaths (N, 2 or 3) of three fixations at least, after simplification two.
        size: H and W.
        angle: in degrees; where given, both are `simplified` first, by this and `amplitude`. The measure's authors
            take 45; many who use it leave the step out, so say which it was.
        amplitude: in pixels.

    Raises:
        ValueError: if one is no scanpath, or too short.
    """
    paths = []
    for path in (a_N, b_M):
        check_path(path)
        if len(path) < 3:
            raise ValueError(f"scanpaths must have three fixations at least, got {len(path)}")
        timed = path.double()
        if path.shape[1] == 2:
            timed = torch.cat([timed, timed.new_full((len(path), 1), DURATION_MS)], 1)
        paths.append(timed if angle is None else simplified(timed, angle, amplitude))
    a, b = paths
    u, v = a[1:, :2] - a[:-1, :2], b[1:, :2] - b[:-1, :2]
    pairs_P2 = torch.tensor(_least_way(torch.cdist(u, v).tolist()))
    i_P, j_P = pairs_P2.unbind(1)
    diagonal = math.hypot(*size)
    u, v, d_P, e_P = u[i_P], v[j_P], a[i_P, 2], b[j_P, 2]
    turned = (torch.atan2(u[:, 1], u[:, 0]) - torch.atan2(v[:, 1], v[:, 0])).abs()
    differences = (
        (u - v).norm(dim=1) / (2 * diagonal),
        torch.minimum(turned, 2 * math.pi - turned) / math.pi,
        (u.norm(dim=1) - v.norm(dim=1)).abs() / diagonal,
        (a[i_P, :2] - b[j_P, :2]).norm(dim=1) / diagonal,
        (d_P - e_P).abs() / torch.maximum(d_P, e_P).clamp(min=1e-12),
    )
    return 1 - torch.stack([each.quantile(0.5) for each in differences])


def simplified(path_N: Tensor, angle: float = 45.0, amplitude: float = 0.0) -> Tensor:
    """A scanpath whose arrows that follow each other in one direction, or are short, are merged, until none is left.

    Two arrows become one where they are both shorter than `amplitude`, or the turn between them is less than `angle`;
    the time of the fixation between them goes to the one before it. The ends stay.

    Args:
        path_N: (N, 2 or 3).
        angle: in degrees.
        amplitude: in pixels.

    Raises:
        ValueError: if it is no scanpath.
    """
    check_path(path_N)
    kept = [row.clone() for row in path_N.double()]
    place = 1
    while place < len(kept) - 1:
        before, after = kept[place][:2] - kept[place - 1][:2], kept[place + 1][:2] - kept[place][:2]
        cross = before[0] * after[1] - before[1] * after[0]
        turn = math.degrees(abs(math.atan2(float(cross), float(before @ after))))
        if turn < angle or max(float(before.norm()), float(after.norm())) < amplitude:
            kept[place - 1][2:] += kept[place][2:]
            del kept[place]
            place = max(1, place - 1)  # what was before may now go on straight
        else:
            place += 1
    return torch.stack(kept) if kept else path_N.double()


def check_path(path_N: Tensor) -> None:
    """Raise ValueError unless it is (N, 2) or (N, 3) of finite numbers."""
    if path_N.ndim != 2 or path_N.shape[1] not in (2, 3):
        raise ValueError(f"a scanpath must be (fixations, 2 or 3), got {tuple(path_N.shape)}")
    if not path_N.isfinite().all():
        raise ValueError("a scanpath must be finite, got values that are not")


def _least_way(table: list[list[float]]) -> list[tuple[int, int]]:
    """From the first place of a table to the last, by steps right, down or both: the way with the least sum.

    No step goes back, so a sweep row by row finds what Dijkstra's algorithm does.
    """
    rows, columns = len(table), len(table[0])
    cost = [[math.inf] * columns for _ in range(rows)]
    came: dict[tuple[int, int], tuple[int, int]] = {}
    for i in range(rows):
        for j in range(columns):
            before = [(cost[r][c], (r, c)) for r, c in ((i - 1, j - 1), (i - 1, j), (i, j - 1)) if r >= 0 and c >= 0]
            least, came[i, j] = min(before, key=lambda each: each[0]) if before else (0.0, (i, j))
            cost[i][j] = least + table[i][j]
    way = [(rows - 1, columns - 1)]
    while way[-1] != (0, 0):
        way.append(came[way[-1]])
    return way[::-1]
