"""Scanpaths against each other: by letters, by cells that lie near, by points.

A scanpath is (N, 2 or 3): x and y in pixels, and milliseconds where there are durations.

Shape letters: N, M fixations of two scanpaths, S, T symbols of two sequences, K kinds of symbols, W windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from saccade.explain.gaze.multimatch import DIMENSIONS, check_path, multimatch

#: cells of a line of the grid of letters
LETTERS = 5
#: ScanMatch: columns and rows, what a bin of time lasts in ms, and the distance in cells at which a pair counts 0
BINS, BIN_MS, THRESHOLD = (16, 12), 50, 3.5


def on_image(path_N: Tensor, size: tuple[int, int]) -> Tensor:
    """A scanpath without the fixations that are not on the image.

    Args:
        path_N: (N, 2 or 3).
        size: H and W.

    Raises:
        ValueError: if it is no scanpath.
    """
    check_path(path_N)
    x_N, y_N = path_N[:, 0], path_N[:, 1]
    return path_N[(x_N >= 0) & (x_N < size[1]) & (y_N >= 0) & (y_N < size[0])]


def cells(path_N: Tensor, size: tuple[int, int], grid: tuple[int, int]) -> list[int]:
    """The cell in which each fixation's pixel lies, row by row; what is outside is in the nearest cell.

    Args:
        path_N: (N, 2 or 3).
        size: H and W.
        grid: columns and rows.

    Raises:
        ValueError: if it is no scanpath, or a number is not positive.

    >>> cells(torch.tensor([[0.0, 0.0], [99.0, 30.0]]), (50, 100), (2, 2))
    [0, 3]
    """
    check_path(path_N)
    if min(*size, *grid) < 1:
        raise ValueError(f"size and grid must be positive, got {size} and {grid}")
    columns, rows = grid
    x_N, y_N = path_N.double()[:, :2].floor().unbind(1)
    column_N = (x_N * columns / size[1]).floor().clamp(0, columns - 1).long()
    row_N = (y_N * rows / size[0]).floor().clamp(0, rows - 1).long()
    return (row_N * columns + column_N).tolist()


def aligned(a_S: Sequence[int], b_T: Sequence[int], score_KK: Tensor, gap: float = 0.0) -> float:
    """The best score of two sequences laid beside each other, with gaps (Needleman, Wunsch 1970): the table's largest.

    Args:
        a_S, b_T: symbols, numbers below K.
        score_KK: of two symbols that stand beside each other.
        gap: of a symbol that stands alone.
    """
    scores = score_KK.double().tolist()
    above = [gap * t for t in range(len(b_T) + 1)]
    best = max(above)
    for s, mine in enumerate(a_S, 1):
        row, line = scores[mine], [gap * s]
        for t, theirs in enumerate(b_T):
            line.append(max(above[t] + row[theirs], above[t + 1] + gap, line[t] + gap))
        above = line
        best = max(best, max(line))
    return best


def string_edit_distance(
    a_N: Tensor, b_M: Tensor, size: tuple[int, int], *, grid: tuple[int, int] = (LETTERS, LETTERS), cost: int = 1
) -> int:
    """SED: how many letters must be put in, taken out or (at `cost`) replaced, a letter for each cell of a grid.

    Args:
        a_N, b_M: scanpaths.
        size: H and W.
        grid: columns and rows.
        cost: of a replacement.

    Raises:
        ValueError: if one is no scanpath, or a number is not positive.
    """
    a_S, b_T = cells(a_N, size, grid), cells(b_M, size, grid)
    above = list(range(len(b_T) + 1))
    for s, mine in enumerate(a_S, 1):
        line = [s]
        for t, theirs in enumerate(b_T):
            line.append(min(above[t] + cost * (mine != theirs), above[t + 1] + 1, line[t] + 1))
        above = line
    return above[-1]


def string_edit_similarity(
    a_N: Tensor, b_M: Tensor, size: tuple[int, int], *, grid: tuple[int, int] = (LETTERS, LETTERS)
) -> float:
    """1 - SED / max(N, M), 1 for equal strings; of two empty scanpaths too.

    Args:
        a_N, b_M: scanpaths.
        size: H and W.
        grid: columns and rows.

    Raises:
        ValueError: as for the distance.
    """
    return 1 - string_edit_distance(a_N, b_M, size, grid=grid) / max(len(a_N), len(b_M), 1)


def scanmatch(
    a_N: Tensor,
    b_M: Tensor,
    size: tuple[int, int],
    *,
    bins: tuple[int, int] = BINS,
    time_bin: float = BIN_MS,
    threshold: float = THRESHOLD,
    gap: float = 0.0,
) -> float:
    """ScanMatch: the best alignment of cells, over the best that the longer could have; 1 for equal scanpaths.

    Two cells at a distance d count threshold - d; a cell is written round(duration / time_bin) times.

    Args:
        a_N, b_M: scanpaths, with durations where there are bins of time.
        size: H and W.
        bins: columns and rows.
        time_bin: in milliseconds; 0 writes each cell once.
        threshold: in cells.
        gap: what a gap counts.

    Raises:
        ValueError: if one is no scanpath, has no durations, or none is long enough to be written.
    """
    a_S, b_T = (cells(path, size, bins) for path in (a_N, b_M))
    if time_bin:
        a_S, b_T = (_by_time(each, path, time_bin) for each, path in ((a_S, a_N), (b_T, b_M)))
    if not a_S or not b_T:
        raise ValueError("scanpaths must have a fixation each that lasts long enough, got none")
    return aligned(a_S, b_T, nearness(bins, threshold), gap) / (threshold * max(len(a_S), len(b_T)))


def time_delay_distances(human_N: Tensor, simulated_M: Tensor, k: int) -> Tensor:
    """Of each run of k fixations of the simulated scanpath, how far it is from the human's nearest run, (W,).

    The distance of two runs is the mean of the distances of their points. Their mean is the distance of time-delay
    embeddings, their maximum Hausdorff's.

    Args:
        human_N, simulated_M: scanpaths of k fixations at least.
        k: of a run.

    Raises:
        ValueError: if there are no such runs.
    """
    for path in (human_N, simulated_M):
        check_path(path)
    if not 1 <= k <= min(len(human_N), len(simulated_M)):
        raise ValueError(f"k must be from 1 to {min(len(human_N), len(simulated_M))} fixations, got {k}")
    apart_MN = torch.cdist(simulated_M[:, :2].double(), human_N[:, :2].double())
    windows = [apart_MN[i : len(simulated_M) - k + 1 + i, i : len(human_N) - k + 1 + i] for i in range(k)]
    return (sum(windows[1:], windows[0]) / k).amin(1)


def time_delay_similarity(human_N: Tensor, simulated_M: Tensor, size: tuple[int, int]) -> float:
    """STDE, the mean over k of exp(-s_k), s_k the mean of `time_delay_distances` in shares of the longer side.

    1 for equal scanpaths; not the same both ways.

    Args:
        human_N, simulated_M: scanpaths.
        size: H and W.

    Raises:
        ValueError: if one is empty.
    """
    return float((-_embedded(human_N, simulated_M, size)).exp().mean())


def time_delay_distance(human_N: Tensor, simulated_M: Tensor, size: tuple[int, int]) -> float:
    """The mean over k of s_k; see `time_delay_similarity`.

    Args:
        human_N, simulated_M: scanpaths.
        size: H and W.

    Raises:
        ValueError: if one is empty.
    """
    return float(_embedded(human_N, simulated_M, size).mean())


def warping_distance(a_N: Tensor, b_M: Tensor) -> float:
    """DTW: the least sum of distances of points over all ways to walk both scanpaths from their starts to their ends.

    Args:
        a_N, b_M: scanpaths.

    Raises:
        ValueError: if one is empty.
    """
    for path in (a_N, b_M):
        check_path(path)
    if not len(a_N) or not len(b_M):
        raise ValueError("scanpaths must have a fixation each, got none")
    apart = torch.cdist(a_N[:, :2].double(), b_M[:, :2].double()).tolist()
    above = [0.0] + [math.inf] * len(b_M)
    for row in apart:
        line = [math.inf]
        for t, distance in enumerate(row):
            line.append(distance + min(above[t], above[t + 1], line[t]))
        above = line
    return above[-1]


def scanpath_scores(truth_N: Tensor, found_M: Tensor, size: tuple[int, int]) -> dict[str, float]:
    """All figures of two scanpaths that need nothing else, by name; those on the image count.

    `sed`, `sed_similarity`, `scanmatch` (with durations where both have them), `stde`, `dtw`, and of MultiMatch the
    five, where both have three fixations at least.

    Args:
        truth_N, found_M: scanpaths.
        size: H and W.

    Raises:
        ValueError: if one has no fixation on the image.
    """
    truth_N, found_M = on_image(truth_N, size), on_image(found_M, size)
    timed = truth_N.shape[1] == found_M.shape[1] == 3
    found = {
        "sed": float(string_edit_distance(truth_N, found_M, size)),
        "sed_similarity": string_edit_similarity(truth_N, found_M, size),
        "scanmatch": scanmatch(truth_N, found_M, size, time_bin=BIN_MS if timed else 0),
        "stde": time_delay_similarity(truth_N, found_M, size),
        "dtw": warping_distance(truth_N, found_M),
    }
    if min(len(truth_N), len(found_M)) >= 3:
        five = multimatch(truth_N, found_M, size).tolist()
        found |= {f"multimatch_{name}": value for name, value in zip(DIMENSIONS, five)}
    return found


def _embedded(human_N: Tensor, simulated_M: Tensor, size: tuple[int, int]) -> Tensor:
    """s_k of each k."""
    shortest = min(len(human_N), len(simulated_M))
    if not shortest:
        raise ValueError("scanpaths must have a fixation each, got none")
    means = [time_delay_distances(human_N, simulated_M, k).mean() for k in range(1, shortest + 1)]
    return torch.stack(means) / max(size)


def nearness(bins: tuple[int, int], threshold: float) -> Tensor:
    """What two cells of a grid count in ScanMatch, (K, K): the threshold less their distance in cells.

    Args:
        bins: columns and rows.
        threshold: in cells.
    """
    columns, rows = bins
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    place_K2 = torch.stack([across.flatten(), down.flatten()], 1).double()
    return threshold - torch.cdist(place_K2, place_K2)


def _by_time(symbols: Sequence[int], path_N: Tensor, time_bin: float) -> list[int]:
    if path_N.shape[1] < 3:
        raise ValueError("scanpaths must have durations where time_bin is not 0, got none")
    times = (round(int(duration) / time_bin) for duration in path_N[:, 2].tolist())
    return [symbol for symbol, count in zip(symbols, times) for _ in range(count)]
