"""The sequence score: scanpaths as strings of the regions that fixations fall into, clusters or labelled parts.

Shape letters: N, M fixations of two scanpaths, C clusters, S, T symbols of two sequences, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.explain.gaze.multimatch import check_path
from saccade.extras import need

#: times the estimated bandwidth, of which the best is taken; the quantile of the estimate
FACTORS, QUANTILE = (0.2, 0.5, 0.8, 1.0, 1.2, 1.5, 1.8), 0.3
#: fixations of a scanpath that count, and milliseconds of a symbol
MOST, BIN_MS = 16, 50


class Clusters(NamedTuple):
    """Where the fixations of an image gather.

    Attributes:
        centres: (C, 2), x and y in pixels.
        bandwidth: of the kernel that found them, in pixels.
        estimated: what the estimate gave, before its factor.
    """

    centres: Tensor
    bandwidth: float
    estimated: float

    def symbols(self, path_N: Tensor) -> list[int]:
        """The nearest centre of each fixation, by its number."""
        check_path(path_N)
        return torch.cdist(path_N[:, :2].double(), self.centres).argmin(1).tolist()


def clusters(paths: Sequence[Tensor], factors: Sequence[float] = FACTORS) -> Clusters:
    """Mean shift over all fixations of an image, with the bandwidth that keeps scanpaths moving between clusters.

    Of the factors of scikit-learn's estimate, the one with the largest (steps between clusters - steps within one) /
    number of clusters; of equally good ones the first.

    Args:
        paths: human scanpaths of one image, (N, 2 or 3) each.
        factors: of the bandwidth.

    Raises:
        ImportError: if scikit-learn is not installed.
        ValueError: if there is no fixation, or all lie at one point.
    """
    for path in paths:
        check_path(path)
    points = torch.cat([path[:, :2].double() for path in paths]).numpy() if paths else ()
    if len(points) < 2:
        raise ValueError(f"scanpaths must have two fixations at least, got {len(points)}")
    source = need("sklearn.cluster", "the sequence score")
    estimated = float(source.estimate_bandwidth(points, quantile=QUANTILE))
    if not estimated > 0:
        raise ValueError("fixations must lie at more than one point, got one")
    best: tuple[float, Clusters] | None = None
    for factor in factors:
        centres = source.MeanShift(bandwidth=factor * estimated).fit(points).cluster_centers_
        tried = Clusters(torch.as_tensor(centres, dtype=torch.double), factor * estimated, estimated)
        strings = [tried.symbols(path) for path in paths]
        steps = [a != b for string in strings for a, b in zip(string, string[1:])]
        worth = (2 * sum(steps) - len(steps)) / len(centres)
        if best is None or worth > best[0]:
            best = worth, tried
    assert best is not None
    return best[1]


def regions(path_N: Tensor, labels_HW: Tensor) -> list[int]:
    """The label under each fixation, of a panoptic segmentation: the symbols of the semantic sequence score.

    Args:
        path_N: (N, 2 or 3), on the image.
        labels_HW: numbers.

    Raises:
        ValueError: if a fixation is not on the image.
    """
    check_path(path_N)
    x_N, y_N = path_N[:, :2].floor().long().unbind(1)
    height, width = labels_HW.shape
    if len(path_N) and (min(x_N.min(), y_N.min()) < 0 or x_N.max() >= width or y_N.max() >= height):
        raise ValueError(f"fixations must be on the image of {width} x {height}, got some that are not")
    return labels_HW[y_N, x_N].tolist()


def repeated(symbols: Sequence[int], durations_N: Tensor, time_bin: float = BIN_MS) -> list[int]:
    """Each symbol as often as whole bins of time fit into its fixation.

    Args:
        symbols: of N fixations.
        durations_N: in milliseconds.
        time_bin: in milliseconds.
    """
    return [symbol for symbol, d in zip(symbols, durations_N.tolist()) for _ in range(int(d // time_bin))]


def match(a_S: Sequence[int], b_T: Sequence[int]) -> float:
    """Needleman and Wunsch with 1 for equal symbols and 0 for others and gaps, over the longer length; 0 of nothing.

    That is the length of the longest common subsequence.

    Args:
        a_S, b_T: symbols.

    >>> match([0, 1, 2], [0, 2, 2, 3])
    0.5
    """
    above = [0] * (len(b_T) + 1)
    for mine in a_S:
        line = [0]
        for t, theirs in enumerate(b_T):
            line.append(above[t] + 1 if mine == theirs else max(above[t + 1], line[t]))
        above = line
    return above[-1] / max(len(a_S), len(b_T), 1)


def sequence_score(
    a_N: Tensor, b_M: Tensor, where: Clusters | Tensor, *, time_bin: float = 0.0, most: int = MOST
) -> float:
    """SS: `match` of the symbols of two scanpaths; 1 for equal strings, 0 where they share no region.

    Args:
        a_N, b_M: (N, 2 or 3), with durations where there are bins of time.
        where: the clusters of the image's human fixations, or labels (H, W) of its regions.
        time_bin: in milliseconds; 0 writes each symbol once.
        most: fixations of each that count.

    Raises:
        ValueError: if one is no scanpath, or has no durations.
    """
    strings = []
    for path in (a_N[:most], b_M[:most]):
        symbols = where.symbols(path) if isinstance(where, Clusters) else regions(path, where)
        if time_bin:
            if path.shape[1] < 3:
                raise ValueError("scanpaths must have durations where time_bin is not 0, got none")
            symbols = repeated(symbols, path[:, 2], time_bin)
        strings.append(symbols)
    return match(*strings)
