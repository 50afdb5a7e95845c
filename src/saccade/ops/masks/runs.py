"""Keys in order as runs: lists of ranges that rise and do not touch, as `Mask.reach` gives them.

Shape letters: M keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

Runs = list[range]


def runs_of(seen_M: Tensor) -> Runs:
    """The runs of True in a bool tensor of one axis.

    >>> runs_of(torch.tensor([True, True, False, True]))
    [range(0, 2), range(3, 4)]
    """
    edges = torch.nn.functional.pad(seen_M.to(torch.int8), (1, 1)).diff()
    first, end = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
    return [range(a, b) for a, b in zip(first, end)]


def shared(a: Sequence[range], b: Sequence[range]) -> Runs:
    """What is in both.

    >>> shared([range(0, 4), range(6, 9)], [range(2, 7)])
    [range(2, 4), range(6, 7)]
    """
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        low, high = max(a[i].start, b[j].start), min(a[i].stop, b[j].stop)
        if low < high:
            found.append(range(low, high))
        if a[i].stop < b[j].stop:
            i += 1
        else:
            j += 1
    return found


def joined(runs: Iterable[range], gap: int = 0) -> Runs:
    """What is in any of them, with the holes of up to `gap` keys filled.

    >>> joined([range(4, 6), range(0, 4), range(7, 9)]), joined([range(0, 2), range(3, 4)], gap=1)
    ([range(0, 6), range(7, 9)], [range(0, 4)])
    """
    found: Runs = []
    for run in sorted((run for run in runs if run), key=lambda run: run.start):
        if found and run.start <= found[-1].stop + gap:
            found[-1] = range(found[-1].start, max(found[-1].stop, run.stop))
        else:
            found.append(run)
    return found
