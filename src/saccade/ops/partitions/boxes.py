"""The parts into which the borders of a grid cut its windows: at most 3^d kinds of equal boxes, as views.

Shape letters: B batch, H heads, N tokens of the grid, P masks, T tokens of a window; X and Y what stands before and
after the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from saccade.ops.export import weigh
from saccade.ops.heads import repeat_heads


@dataclass(frozen=True)
class _Segment:
    """Equal parts of windows on one axis."""

    start: int  #: first token
    count: int
    length: int  #: tokens of each
    inside: int  #: place of its first token in the window


def _segments(n: int, window: int, shift: int) -> list[_Segment]:
    if n <= window:
        return [_Segment(0, 1, n, 0)]
    whole, rest = divmod(n - shift, window)
    parts = [
        _Segment(0, 1, shift, window - shift),
        _Segment(shift, whole, window, 0),
        _Segment(n - rest, 1, rest, 0),
    ]
    return [part for part in parts if part.count and part.length]


@dataclass(frozen=True)
class Boxes:
    """The boxes of one kind: a segment of each axis."""

    grid: tuple[int, ...]
    windows: tuple[int, ...]
    segments: tuple[_Segment, ...]

    @property
    def tokens(self) -> int:
        return prod(s.length for s in self.segments)

    def view(self, x_BXNY: Tensor) -> Tensor:
        """(B, n_1 .. n_d, X, l_1 .. l_d, Y): the boxes' tokens, a view."""
        x, d = x_BXNY.unflatten(2, self.grid), len(self.grid)
        for axis, s in enumerate(self.segments):
            x = x.narrow(2 + 2 * axis, s.start, s.count * s.length).unflatten(2 + 2 * axis, (s.count, s.length))
        return x.permute(0, *range(2, 2 + 2 * d, 2), 1, *range(3, 3 + 2 * d, 2), 2 + 2 * d)

    def pairs(self, bias_HTT: Tensor) -> Tensor:
        """(H, l_1 .. l_d, l_1 .. l_d) of a bias, a view."""
        x, d = bias_HTT.unflatten(2, self.windows).unflatten(1, self.windows), len(self.grid)
        for axis, s in enumerate(self.segments):
            x = x.narrow(1 + axis, s.inside, s.length).narrow(1 + d + axis, s.inside, s.length)
        return x


@lru_cache(maxsize=64)
def kinds_of_boxes(spec: tuple[int, ...]) -> tuple[Boxes, ...]:
    d = len(spec) // 3
    grid, windows, shifts = spec[:d], spec[d : 2 * d], spec[2 * d :]
    axes = [_segments(n, w, s) for n, w, s in zip(grid, windows, shifts)]
    return tuple(Boxes(grid, windows, segments) for segments in product(*axes))


def in_plain_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_HTT: Tensor | None,
    mask_PTT: Tensor | None,
    spec: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and LSE in operators that every exporter knows: each kind of box as one batch, then side by side."""
    (B, H), d = q.shape[:2], len(spec) // 3
    k, v = (repeat_heads(x, H) for x in (k, v))
    parts = []
    for boxes in kinds_of_boxes(spec):
        counts, lengths = ([getattr(s, name) for s in boxes.segments] for name in ("count", "length"))
        T, n = boxes.tokens, prod(counts)
        q_, k_, v_ = (boxes.view(x).reshape(B * n, H, T, x.shape[3]) for x in (q, k, v))
        scores = (q_ * scale) @ k_.mT
        if bias_HTT is not None:
            scores = scores + boxes.pairs(bias_HTT).reshape(H, T, T)
        if mask_PTT is not None:
            scores = scores + mask_PTT[torch.arange(B, device=q.device) % mask_PTT.shape[0]][:, None]
        out, lse = weigh(scores, v_)
        both = torch.cat([out, lse[..., None]], -1).view(B, *counts, H, *lengths, -1)
        axes = [axis for pair in zip(range(1, 1 + d), range(2 + d, 2 + 2 * d)) for axis in pair]
        both = both.permute(0, 1 + d, *axes, 2 + 2 * d)
        parts.append(both.reshape(B, H, *(c * l for c, l in zip(counts, lengths)), -1))
    for axis in reversed(range(d)):
        number = len({boxes.segments[axis].start for boxes in kinds_of_boxes(spec)})
        parts = [torch.cat(parts[i : i + number], 2 + axis) for i in range(0, len(parts), number)]
    out, lse = parts[0].flatten(2, 1 + d).split([v.shape[3], 1], -1)
    return out, lse[..., 0]


def cuts_of(counts: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cuts of axes of `counts` in which there are at most `most` items (but one at least)."""
    cuts: list[list[slice]] = []
    for count in reversed(counts):
        step = max(1, min(count, most))
        most //= step
        cuts.insert(0, [slice(a, min(a + step, count)) for a in range(0, count, step)])
    yield from product(*cuts)
