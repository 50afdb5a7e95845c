"""How time and memory grow with length: a sweep, and a power law through it.

y = a N^p,    log y = log a + p log N   by least squares
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from saccade.ops.measure import cost


@dataclass
class ScalingPoint:
    """One length of a sweep, on one sequence.

    Attributes:
        length: tokens (positions, for feature maps).
        forward_seconds: of the fastest forward pass without gradients.
        seconds: of the fastest forward and backward.
        bytes: peak of the tensors that forward and backward keep alive beyond parameters and input, as torch's
            allocator counts them.
    """

    length: int
    forward_seconds: float
    seconds: float
    bytes: int


@dataclass
class Fit:
    """The power law `factor * length ** exponent`.

    Attributes:
        exponent, factor: of the law.
        r2: share of the variance, in logs, that it explains.
        from_length: the shortest length in the fit; shorter ones measure overhead.
    """

    exponent: float
    factor: float
    r2: float
    from_length: int

    def __call__(self, length: float) -> float:
        return self.factor * length**self.exponent


def fit_power(lengths: Sequence[float], values: Sequence[float], last: int | None = None) -> Fit | None:
    """Least squares in logs over the `last` longest lengths (all, where None); None with fewer than two usable points.

    Args:
        lengths, values: in any order; those that are not positive do not count.
        last: how many of the longest lengths.

    >>> round(fit_power([1, 2, 4], [3, 12, 48]).exponent, 6)
    2.0
    """
    pairs = sorted((n, y) for n, y in zip(lengths, values) if n > 0 and y > 0)
    pairs = pairs[-last:] if last else pairs
    if len({n for n, _ in pairs}) < 2:
        return None
    xs, ys = [math.log(n) for n, _ in pairs], [math.log(y) for _, y in pairs]
    mean_x, mean_y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    exponent = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / spread
    intercept = mean_y - exponent * mean_x
    total = sum((y - mean_y) ** 2 for y in ys)
    residual = sum((y - intercept - exponent * x) ** 2 for x, y in zip(xs, ys))
    return Fit(exponent, math.exp(intercept), 1.0 - residual / total if total > 0 else 1.0, int(pairs[0][0]))


def sweep(
    part: nn.Module,
    inputs: Callable[[int], tuple[object, ...]],
    lengths: Sequence[int],
    *,
    seconds_per_point: float = 0.5,
    limit_seconds: float = 5.0,
    on_point: Callable[[ScalingPoint], None] | None = None,
    on_refusal: Callable[[str], None] | None = None,
) -> list[ScalingPoint]:
    """Measure `part` alone against length.

    All lengths are gone through twice, so that a disturbance of the machine is not taken for the cost of one length;
    one that seems to take longer than the next is measured again.

    Args:
        part: is put in training mode.
        inputs: length -> the call's positional arguments; floating tensors among them get gradients.
        lengths: ascending.
        seconds_per_point: repeat a measurement for up to so long (25 times at most, twice at least, after a first
            call; once, where a call takes longer than a quarter of `limit_seconds`).
        limit_seconds: stop before a length at which one forward and backward would take longer (extrapolated from the
            last two lengths).
        on_point: called with each point when it is first measured.
        on_refusal: called with the reason where the part takes no length as long as one that is due, which ends the
            sweep; without it the ValueError is the caller's.

    Raises:
        ValueError: if the part refuses a length and there is no `on_refusal`.
    """
    part.train()
    points: list[ScalingPoint] = []

    def measured(length: int) -> ScalingPoint:
        arguments = tuple(
            x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs(length)
        )
        found = cost(part, arguments, repeats=12, budget=seconds_per_point / 2)
        return ScalingPoint(length, found.forward, found.both, found.memory)

    def again(index: int) -> None:
        new, old = measured(points[index].length), points[index]
        fastest = min(new.forward_seconds, old.forward_seconds), min(new.seconds, old.seconds)
        points[index] = ScalingPoint(old.length, *fastest, old.bytes)

    for length in lengths:
        if len(points) > 1:
            law = fit_power([p.length for p in points[-2:]], [p.seconds for p in points[-2:]])
            if law is not None and law(length) > limit_seconds:
                break
        try:
            points.append(measured(length))
        except ValueError as error:
            if on_refusal is None:
                raise
            on_refusal(str(error))
            break
        if on_point is not None:
            on_point(points[-1])
    for index, point in enumerate(points):
        if point.seconds <= limit_seconds / 4:
            again(index)
    for index in reversed(range(len(points) - 1)):  # each against one that is right already
        for _ in range(_AGAIN):
            if points[index].seconds <= _FALLS * points[index + 1].seconds:
                break
            again(index)
    return points


#: times that a point is measured again while it takes longer than this many times the next length
_AGAIN, _FALLS = 3, 1.1


def fits(points: Sequence[ScalingPoint], last: int = 4) -> dict[str, Fit]:
    """Power laws through the `last` longest lengths of a sweep, by name of the figure.

    A time that falls with length was not measured, whatever the figures say, and has no law.

    Args:
        points: of `sweep`.
        last: how many of the longest lengths.
    """
    lengths = [point.length for point in points]
    found = {
        name: fit_power(lengths, [getattr(point, name) for point in points], last)
        for name in ("forward_seconds", "seconds", "bytes")
    }
    return {name: fit for name, fit in found.items() if fit is not None and (name == "bytes" or fit.exponent >= 0)}
