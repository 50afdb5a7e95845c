"""Maps of where people look: against the points that were fixated, and against their density.

P is a map, F the fixated pixels, G a density; (P - mean) / std and P / sum P are over all pixels.

Shape letters: H height, W width, N points, K fixations of a scanpath.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: of MIT's saliency benchmark
EPS = 2.2e-16
#: a degree of the visual field as a share of the longer side, where none is given
BLUR = 0.035


def fixation_map(points_N2: Tensor, size: tuple[int, int]) -> Tensor:
    """Where points lie, (H, W) of 0 and 1; those outside are left out.

    Args:
        points_N2: x and y in pixels.
        size: H and W.
    """
    return (fixation_counts(points_N2, size) > 0).double()


def density_map(points_N2: Tensor, size: tuple[int, int], sigma: float | None = None) -> Tensor:
    """How densely points lie: their number in each pixel, blurred by a Gaussian, with sum 1 (zeros without points).

    The kernel ends at four sigma, and the map is mirrored at its edges (the edge pixel too).

    Args:
        points_N2: x and y in pixels.
        size: H and W.
        sigma: of the Gaussian in pixels, a degree of the visual field; 0.035 max(H, W) where None.

    Raises:
        ValueError: if sigma is not positive.
    """
    return blurred(fixation_counts(points_N2, size), sigma)


def blurred(counts_HW: Tensor, sigma: float | None = None) -> Tensor:
    """`density_map` of what `fixation_counts` gives.

    Args:
        counts_HW: how many points there are in each pixel.
        sigma: as of `density_map`.

    Raises:
        ValueError: if sigma is not positive.
    """
    sigma = BLUR * max(counts_HW.shape) if sigma is None else sigma
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    down_HH, across_WW = (_blur(length, sigma, counts_HW.device) for length in counts_HW.shape)
    map_HW = down_HH @ counts_HW.double() @ across_WW.T
    return map_HW / map_HW.sum().clamp(min=1e-300)


def resized(map_HW: Tensor, size: Sequence[int], mode: str = "bilinear") -> Tensor:
    """A map in double precision at another size.

    Args:
        map_HW: of any values.
        size: H and W.
        mode: of `torch.nn.functional.interpolate`; "bicubic" is the other that is used.

    Raises:
        ValueError: if it is not a map, or holds what is not a number.
    """
    if map_HW.ndim != 2 or not map_HW.numel():
        raise ValueError(f"map must be (height, width), got {tuple(map_HW.shape)}")
    map_HW = map_HW.detach().double()
    if not map_HW.isfinite().all():
        raise ValueError("map must be finite, got values that are not")
    if map_HW.shape == tuple(size):
        return map_HW
    return F.interpolate(map_HW[None, None], tuple(size), mode=mode, align_corners=False)[0, 0]


def area_under(positive_N: Tensor, negative_N: Tensor) -> float:
    """How often a value of the first kind is the larger one of a pair; a tie is half.

    Args:
        positive_N, negative_N: any numbers of values.

    Raises:
        ValueError: if there is none of a kind.

    >>> area_under(torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.0]))
    0.875
    """
    if not len(positive_N) or not len(negative_N):
        raise ValueError(f"there must be values of both kinds, got {len(positive_N)} and {len(negative_N)}")
    ordered = negative_N.double().sort().values
    positive_N = positive_N.double().contiguous()
    below, up_to = (torch.searchsorted(ordered, positive_N, right=right) for right in (False, True))
    return float((below + up_to).double().mean()) / (2 * len(ordered))


def nss(map_HW: Tensor, fixations_HW: Tensor, *, ddof: int = 0) -> float:
    """Normalised scanpath saliency, the mean over F of (P - mean) / std; 0 for a constant map.

    Args:
        map_HW: P.
        fixations_HW: 1 at F.
        ddof: 1 divides the variance by one less than the pixels.

    Raises:
        ValueError: if there is no fixation.
    """
    map_HW, at_HW = _with(map_HW, fixations_HW)
    return float(_standard(map_HW, ddof)[at_HW].mean())


def correlation(map_HW: Tensor, density_HW: Tensor) -> float:
    """CC, Pearson's correlation of P and G; 0 where one is constant.

    Args:
        map_HW: P.
        density_HW: G.
    """
    p_HW = resized(map_HW, density_HW.shape)
    return float((_standard(p_HW) * _standard(density_HW.double())).mean())


def similarity(map_HW: Tensor, density_HW: Tensor) -> float:
    """SIM, the sum of min(P / sum P, G / sum G), from 0 to 1.

    Args:
        map_HW: P, not negative.
        density_HW: G, not negative.

    Raises:
        ValueError: if a value is negative, or all are 0.
    """
    p_HW = resized(map_HW, density_HW.shape)
    return float(torch.minimum(_distribution(p_HW), _distribution(density_HW)).sum())


def divergence(map_HW: Tensor, density_HW: Tensor, *, eps: float = EPS) -> float:
    """KL, the sum of G log(eps + G / (P + eps)), both with sum 1; 0 for equal maps.

    Args:
        map_HW: P, not negative.
        density_HW: G, not negative.
        eps: against division by 0.

    Raises:
        ValueError: if a value is negative, or all are 0.
    """
    p_HW, g_HW = _distribution(resized(map_HW, density_HW.shape)), _distribution(density_HW)
    return float((g_HW * (eps + g_HW / (p_HW + eps)).log()).sum())


def auc_judd(
    map_HW: Tensor,
    fixations_HW: Tensor,
    *,
    jitter: float = 0.0,
    counts_itself: bool = False,
    generator: torch.Generator | None = None,
) -> float:
    """The area under the curve of hits over false alarms, at thresholds that are the values at fixations.

    Hits: the share of fixated pixels at the threshold or above; false alarms: of those that are not fixated.

    Args:
        map_HW: P.
        fixations_HW: 1 at F.
        jitter: uniform noise of this size, of the map's range, that breaks ties; the standard is 1e-7.
        counts_itself: the numerator of the false alarms at each threshold has one pixel too many, that of the
            threshold itself, as the survey's authors compute it.
        generator: of the noise.

    Raises:
        ValueError: if there is no fixation, or nothing else.
    """
    map_HW, at_HW = _with(map_HW, fixations_HW)
    if at_HW.all():
        raise ValueError("fixations must leave some pixels out, got all of them")
    least, most = map_HW.min(), map_HW.max()
    if most == least:
        return 0.5
    map_HW = (map_HW - least) / (most - least)
    if jitter:
        map_HW = map_HW + jitter * torch.rand(map_HW.shape, generator=generator, dtype=map_HW.dtype)
    thresholds = map_HW[at_HW].sort(descending=True).values
    hits, others = (_at_least(map_HW[where], thresholds) for where in (at_HW, ~at_HW))
    alarms = (others + counts_itself) / (~at_HW).sum()
    return _area(alarms, hits / at_HW.sum())


def auc_borji(
    map_HW: Tensor,
    fixations_HW: Tensor,
    *,
    splits: int = 100,
    step: float = 0.1,
    generator: torch.Generator | None = None,
) -> float:
    """The area under hits over false alarms of random pixels, as many as fixations; the mean over draws.

    Args:
        map_HW: P, scaled to [0, 1].
        fixations_HW: 1 at F.
        splits: draws.
        step: between thresholds, from 0 up to the largest value at a fixation or a drawn pixel.
        generator: of the draws.

    Raises:
        ValueError: if there is no fixation, or a number is not positive.
    """
    if splits < 1 or not step > 0:
        raise ValueError(f"splits and step must be positive, got {splits} and {step}")
    map_HW, at_HW = _with(map_HW, fixations_HW)
    least, most = map_HW.min(), map_HW.max()
    if most == least:
        return 0.5
    map_HW = (map_HW - least) / (most - least)
    hit_N, total = map_HW[at_HW], 0.0
    for _ in range(splits):
        drawn = torch.randint(map_HW.numel(), (len(hit_N),), generator=generator)
        other_N = map_HW.flatten()[drawn]
        thresholds = torch.arange(0, float(max(hit_N.max(), other_N.max())) + 1e-12, step, dtype=map_HW.dtype).flip(0)
        total += _area(*(_at_least(values, thresholds) / len(hit_N) for values in (other_N, hit_N)))
    return total / splits


def shuffled_auc(map_HW: Tensor, fixations_HW: Tensor, others_HW: Tensor) -> float:
    """sAUC: how often a fixated pixel has the larger value than one that is fixated in other images (a tie is half).

    A map of the centre alone gets 1/2 where all images draw the eye to their centre.

    Args:
        map_HW: P.
        fixations_HW: 1 at F.
        others_HW: how many fixations of other images there are in each pixel.

    Raises:
        ValueError: if there is no fixation of this image, or of others.
    """
    map_HW, at_HW = _with(map_HW, fixations_HW)
    others_N = map_HW.flatten().repeat_interleave(others_HW.flatten().long())
    return area_under(map_HW[at_HW], others_N)


def information_gain(map_HW: Tensor, fixations_HW: Tensor, baseline_HW: Tensor, *, eps: float = EPS) -> float:
    """IG in bits, the mean over F of log2(eps + P) - log2(eps + B), both with sum 1.

    Args:
        map_HW: P, not negative.
        fixations_HW: 1 at F.
        baseline_HW: B, a map that knows nothing of the image, not negative.
        eps: against log 0.

    Raises:
        ValueError: if there is no fixation, a value is negative, or all are 0.
    """
    map_HW, at_HW = _with(map_HW, fixations_HW)
    p_HW, b_HW = _distribution(map_HW), _distribution(resized(baseline_HW, fixations_HW.shape))
    return float(((eps + p_HW).log2() - (eps + b_HW).log2())[at_HW].mean())


def map_scores(
    map_HW: Tensor,
    fixations_HW: Tensor,
    density_HW: Tensor,
    *,
    others_HW: Tensor | None = None,
    baseline_HW: Tensor | None = None,
) -> dict[str, float]:
    """All figures of one map, by name: `auc_judd`, `nss`, `cc`, `sim`, `kl`, and `sauc` and `ig` where they can be.

    Args:
        map_HW: P, not negative.
        fixations_HW: 1 at F.
        density_HW: G.
        others_HW: how many fixations of other images there are in each pixel; without, there is no `sauc`.
        baseline_HW: B; without, there is no `ig`.

    Raises:
        ValueError: if one of the measures does.
    """
    found = {
        "auc_judd": auc_judd(map_HW, fixations_HW),
        "nss": nss(map_HW, fixations_HW),
        "cc": correlation(map_HW, density_HW),
        "sim": similarity(map_HW, density_HW),
        "kl": divergence(map_HW, density_HW),
    }
    if others_HW is not None:
        found["sauc"] = shuffled_auc(map_HW, fixations_HW, others_HW)
    if baseline_HW is not None:
        found["ig"] = information_gain(map_HW, fixations_HW, baseline_HW)
    return found


def next_fixation_scores(
    maps_KHW: Tensor, path_K2: Tensor, measure: Callable[[Tensor, Tensor], float] = nss
) -> list[float]:
    """A figure for each fixation of a scanpath: of the map that was foretold for it after those before it.

    Args:
        maps_KHW: of each fixation.
        path_K2: the fixations, x and y in pixels.
        measure: of a map and fixations, `nss` or `auc_judd`.

    Raises:
        ValueError: if there is not a map for each, or a fixation is outside.
    """
    if len(maps_KHW) != len(path_K2):
        raise ValueError(f"maps must be one for each of {len(path_K2)} fixations, got {len(maps_KHW)}")
    size = (maps_KHW.shape[1], maps_KHW.shape[2])
    return [measure(map_HW, fixation_map(point[None, :2], size)) for map_HW, point in zip(maps_KHW, path_K2)]


def fixation_counts(points_N2: Tensor, size: tuple[int, int]) -> Tensor:
    """How many points lie in each pixel, (H, W); those outside are left out.

    Args:
        points_N2: x and y in pixels.
        size: H and W.
    """
    height, width = size
    x_N, y_N = points_N2.double()[:, :2].floor().long().unbind(1)
    inside = (x_N >= 0) & (x_N < width) & (y_N >= 0) & (y_N < height)
    places = y_N[inside] * width + x_N[inside]
    return places.bincount(minlength=height * width).double().view(height, width)


def _blur(length: int, sigma: float, device: torch.device) -> Tensor:
    """The blur of a line as a matrix, mirrored at both ends."""
    reach = int(4 * sigma + 0.5)
    offset = torch.arange(-reach, reach + 1, device=device)
    weight = (-0.5 * (offset / sigma).double().square()).exp()
    place = (torch.arange(length, device=device)[:, None] + offset) % (2 * length)
    place = torch.minimum(place, 2 * length - 1 - place)
    return torch.zeros(length, length, dtype=torch.double, device=device).scatter_add_(
        1, place, (weight / weight.sum()).expand(length, -1)
    )


def _with(map_HW: Tensor, fixations_HW: Tensor) -> tuple[Tensor, Tensor]:
    """The map at the fixations' size, and where these are."""
    if fixations_HW.ndim != 2 or not (fixations_HW > 0).any():
        raise ValueError(f"fixations must be a map (height, width) with one at least, got {tuple(fixations_HW.shape)}")
    return resized(map_HW, fixations_HW.shape), fixations_HW > 0


def _standard(map_HW: Tensor, ddof: int = 0) -> Tensor:
    away = map_HW - map_HW.mean()
    # what is left of a constant map is rounding
    if away.abs().max() <= 1e-12 * map_HW.abs().max():
        return torch.zeros_like(map_HW)
    return away / math.sqrt(float(away.square().sum()) / (map_HW.numel() - ddof))


def _distribution(map_HW: Tensor) -> Tensor:
    map_HW = map_HW.double()
    if (map_HW < 0).any() or not map_HW.any():
        raise ValueError(f"map must not be negative, nor 0 all over, got {float(map_HW.min())} to {map_HW.max()}")
    return map_HW / map_HW.sum()


def _at_least(values_N: Tensor, thresholds: Tensor) -> Tensor:
    """How many values are at each threshold or above."""
    below = torch.searchsorted(values_N.sort().values, thresholds.contiguous())
    return len(values_N) - below.double()


def _area(alarms: Tensor, hits: Tensor) -> float:
    """Under the curve through (0, 0), the points, and (1, 1)."""
    ends = alarms.new_tensor([0.0]), alarms.new_tensor([1.0])
    return float(torch.trapezoid(torch.cat([ends[0], hits, ends[1]]), torch.cat([ends[0], alarms, ends[1]])))
