"""Tokens of a grid in the order of a Hilbert curve: what is near on the curve is near in the grid, on every axis.

`hilbert_order` walks the enclosing cube (Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707,
2004). `gilbert_order` walks a box of any sides without leaving it (Cerveny's generalised curve): each token touches
the one before it, or, where sides are odd, now and then a diagonal neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

_Vector = tuple[int, int, int]


def hilbert_order(size: Sequence[int], *, before: int = 0, after: int = 0) -> Tensor:
    """Tokens of a (T, H, W) grid along a Hilbert curve, so that consecutive blocks hold neighbours in space and time.

    `x[:, :, order]` puts row-major tokens on the curve, `out[:, :, order.argsort()]` brings them back; attention
    without a causal mask is unchanged by it. On sides that are no power of two, the curve of the enclosing cube is
    walked and what lies outside is left out.

    Args:
        size: (T, H, W), or any number of axes.
        before, after: tokens before and after the grid (text) that keep their place.

    Raises:
        ValueError: if a side is below 1, or `before` or `after` below 0.

    >>> hilbert_order((2, 2)).tolist()
    [0, 1, 3, 2]
    """
    if not size or min(size) < 1:
        raise ValueError(f"size must be positive on every axis, got {tuple(size)}")
    if before < 0 or after < 0:
        raise ValueError(f"before and after must not be negative, got {before} and {after}")
    bits = max(1, (max(size) - 1).bit_length())
    axes = list(torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij"))
    # the inverse of Skilling's walk: undo exchanges and inversions plane by plane, then Gray-encode
    for bit in reversed(range(1, bits)):
        low = (1 << bit) - 1
        for i in range(len(axes)):
            inverted = (axes[i] >> bit & 1).bool()
            swapped = torch.where(inverted, 0, (axes[0] ^ axes[i]) & low)
            axes[0] = torch.where(inverted, axes[0] ^ low, axes[0] ^ swapped)
            if i > 0:
                axes[i] = axes[i] ^ swapped
    for i in range(1, len(axes)):
        axes[i] = axes[i] ^ axes[i - 1]
    turn = torch.zeros_like(axes[0])
    for bit in reversed(range(1, bits)):
        turn = torch.where((axes[-1] >> bit & 1).bool(), turn ^ ((1 << bit) - 1), turn)
    index = torch.zeros_like(turn)
    for bit in reversed(range(bits)):
        for axis in axes:
            index = index << 1 | ((axis ^ turn) >> bit & 1)
    order = index.flatten().argsort() + before
    text = torch.arange(before), torch.arange(after) + before + order.numel()
    return torch.cat([text[0], order, text[1]])


def gilbert_order(size: Sequence[int], *, before: int = 0, after: int = 0) -> Tensor:
    """Tokens of a (T, H, W) grid along the generalised Hilbert curve of the box W x H x T.

    Used as `hilbert_order`. The curve is cut along the longest sides, so that it never leaves the box.

    Args:
        size: (T, H, W), (H, W) or (W,).
        before, after: tokens before and after the grid (text) that keep their place.

    Raises:
        ValueError: if there are more than three sides, a side is below 1, or `before` or `after` below 0.

    >>> gilbert_order((2, 4)).tolist()
    [0, 4, 5, 1, 2, 6, 7, 3]
    """
    if not 1 <= len(size) <= 3 or min(size) < 1:
        raise ValueError(f"size must be one to three positive sides, got {tuple(size)}")
    if before < 0 or after < 0:
        raise ValueError(f"before and after must not be negative, got {before} and {after}")
    order = torch.tensor(_gilbert(*(1,) * (3 - len(size)), *size)) + before
    return torch.cat([torch.arange(before), order, torch.arange(after) + before + order.numel()])


@lru_cache(maxsize=16)
def _gilbert(T: int, H: int, W: int) -> tuple[int, ...]:
    a, b, c = (W, 0, 0), (0, H, 0), (0, 0, T)
    # the first vector is the longest: the curve runs from one of its ends to the other
    if W >= H and W >= T:
        lines = _walk((0, 0, 0), a, b, c)
    elif H >= T:
        lines = _walk((0, 0, 0), b, a, c)
    else:
        lines = _walk((0, 0, 0), c, a, b)
    return tuple(
        ((z + i * dz) * H + y + i * dy) * W + x + i * dx
        for (x, y, z), (dx, dy, dz), count in lines
        for i in range(count)
    )


def _walk(start: _Vector, a: _Vector, b: _Vector, c: _Vector) -> Iterator[tuple[_Vector, _Vector, int]]:
    """The curve through the box that a, b and c span at `start`, from there to a's far end: (start, step, count)."""
    w, h, d = (abs(sum(side)) for side in (a, b, c))
    if not w * h * d:  # what is left beside a side of one token
        return
    sides = [(side, length) for side, length in ((a, w), (b, h), (c, d)) if length > 1]
    if len(sides) <= 1:
        side, length = sides[0] if sides else (a, 1)
        yield start, _unit(side), length
        return
    half_a, half_b, half_c = _half(a), _half(b), _half(c)
    if 2 * w > 3 * h and 2 * w > 3 * d:  # long: two boxes one after the other
        yield from _walk(start, half_a, b, c)
        yield from _walk(_sum(start, half_a), _sum(a, half_a, -1), b, c)
    elif 3 * h > 4 * d:  # flat in c: there along half of b, along a, and back
        yield from _walk(start, half_b, c, half_a)
        yield from _walk(_sum(start, half_b), a, _sum(b, half_b, -1), c)
        yield from _walk(_last(start, a, half_b), _back(half_b), c, _back(_sum(a, half_a, -1)))
    elif 3 * d > 4 * h:  # flat in b: the same along c
        yield from _walk(start, half_c, half_a, b)
        yield from _walk(_sum(start, half_c), a, b, _sum(c, half_c, -1))
        yield from _walk(_last(start, a, half_c), _back(half_c), _back(_sum(a, half_a, -1)), b)
    else:  # a cube of sorts: eight corners in five boxes
        rest_a, rest_b, rest_c = _sum(a, half_a, -1), _sum(b, half_b, -1), _sum(c, half_c, -1)
        yield from _walk(start, half_b, half_c, half_a)
        yield from _walk(_sum(start, half_b), c, half_a, rest_b)
        yield from _walk(_last(start, half_b, c), a, _back(half_b), _back(rest_c))
        yield from _walk(_sum(_last(start, a, c), half_b), _back(c), _back(rest_a), rest_b)
        yield from _walk(_last(start, a, half_b), _back(half_b), half_c, _back(rest_a))


def _unit(side: _Vector) -> _Vector:
    return tuple((x > 0) - (x < 0) for x in side)  # type: ignore[return-value]


def _sum(a: _Vector, b: _Vector, factor: int = 1) -> _Vector:
    return tuple(x + factor * y for x, y in zip(a, b))  # type: ignore[return-value]


def _back(side: _Vector) -> _Vector:
    return tuple(-x for x in side)  # type: ignore[return-value]


def _half(side: _Vector) -> _Vector:
    """Half a side, an even number of tokens where there are more than two."""
    half: _Vector = tuple(int(x / 2) for x in side)  # type: ignore[assignment]
    return _sum(half, _unit(side)) if abs(sum(half)) % 2 and abs(sum(side)) > 2 else half


def _last(start: _Vector, *sides: _Vector) -> _Vector:
    """The last token of the box that the sides span at `start`."""
    for side in sides:
        start = _sum(_sum(start, side), _unit(side), -1)
    return start


def neighbor_blocks(
    size: Sequence[int],
    order: Tensor | None,
    block_size: int | tuple[int, int],
    *,
    diagonal: bool = True,
) -> Tensor:
    """Which blocks of tokens touch each other in the grid: bool (n, m), n query and m key blocks.

    Blocks i and j are neighbours if a token of i is a grid neighbour of a token of j, or the token itself.

    Args:
        size: sides of the grid, such as (T, H, W).
        order: the tokens' order, a permutation of the grid; row by row where None.
        block_size: tokens per block, one number or (queries, keys).
        diagonal: tokens that differ by one on several axes are neighbours too.

    Raises:
        ValueError: if `order` is no order of the grid, or a block is below 1.

    >>> neighbor_blocks((6,), None, 2).int().tolist()
    [[1, 1, 0], [1, 1, 1], [0, 1, 1]]
    """
    tokens = int(torch.tensor(size).prod())
    block_q, block_k = (block_size, block_size) if isinstance(block_size, int) else block_size
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    order = torch.arange(tokens) if order is None else order
    if order.shape != (tokens,):
        raise ValueError(f"order must be a permutation of the grid's {tokens} tokens, got shape {tuple(order.shape)}")
    place = torch.empty_like(order).scatter_(0, order, torch.arange(tokens, device=order.device)).view(*size)
    # a border of -1 around the grid: who steps over it has no neighbour there
    around = F.pad(place, (1, 1) * len(size), value=-1)
    touch = torch.zeros(-(-tokens // block_q), -(-tokens // block_k), dtype=torch.bool, device=order.device)
    for step in product((0, 1, 2), repeat=len(size)):
        if not diagonal and sum(s != 1 for s in step) > 1:
            continue
        other = around[tuple(slice(s, s + side) for s, side in zip(step, size))]
        real = other >= 0
        touch[place[real] // block_q, other[real] // block_k] = True
    return touch
