"""Products of decays inside chunks, and the scores where each channel has its own: built by halving.

What reaches from the earlier to the later half of a span of 2s tokens is (products to the middle) x (products from the
middle), an outer product for a factor per head, and (q * products from the middle) (k * products to the middle)^T for
a factor per channel; then s doubles. Factors only ever multiply, so any decay in (0, 1] is safe over any length.

Shape letters: b rows of a piece, H heads, T chunks of a piece, c tokens of a chunk, in n spans of s tokens; D feature
width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.ops.linear.pieces import Buffers, Piece, varies


class Decays(NamedTuple):
    """Products of the decays inside chunks: (b, H, T, c, D'), where D' is 1 for a factor per head.

    `between`: (b, H, T, c, c) from key to query, 0 above the diagonal; None where per channel, see `scores_by_halving`.
    `from_start`: from the chunk's start to each token, inclusive. `to_end`: from each token, exclusive, to its end.
    `whole`: (b, H, T, D', 1) of the chunk. The last three are None where nothing decays.
    """

    between: Tensor | None
    from_start: Tensor | None
    to_end: Tensor | None
    whole: Tensor | None


def constant_decays(factors: Tensor | None, c: int, buffers: Buffers, cached: dict[int, Decays]) -> Decays:
    """Of None, or of one factor per head (1, H, 1, 1): lambda^(i - j), the same in all chunks of a length."""
    if c in cached:
        return cached[c]
    if factors is None:
        lower = torch.ones(c, c, dtype=buffers.dtype, device=buffers.device).tril()
        cached[c] = Decays(lower, None, None, None)
    else:
        between, from_start, to_end = powers(factors.unsqueeze(-1), c, buffers.dtype)
        cached[c] = Decays(between, from_start, to_end, from_start[..., -1:, :])
    return cached[c]


def powers(factors: Tensor, c: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Of factors (..., 1, 1), in a chunk of c tokens: between two of them (..., c, c), 0 above the diagonal; from its
    start to each, inclusive, and from each, exclusive, to its end (..., c, 1)."""
    place = torch.arange(c, dtype=torch.float64, device=factors.device)[:, None]
    # log 0 x distance 0 would be NaN; the smallest normal number is as good as 0
    log = factors.double().clamp_min(torch.finfo(dtype).tiny).log()
    distance = (place - place.mT).clamp(min=0)
    found = (log * distance).exp().tril(), (log * (place + 1)).exp(), (log * (c - 1 - place)).exp()
    between, from_start, to_end = (x.to(dtype) for x in found)
    return between, from_start, to_end


def token_decays(factors: Tensor, buffers: Buffers) -> Decays:
    """Of one factor per head and token (b, H, T, c, 1); c is a power of two."""
    between = buffers("between", *factors.shape[:-1], factors.shape[-2]).zero_()
    between.diagonal(0, -2, -1).fill_(1.0)
    from_start, to_end = buffers("from start", *factors.shape), buffers("to end", *factors.shape)
    for s, later_before, earlier_after in _spans_of_products(factors, from_start, to_end):
        torch.mul(later_before, earlier_after.transpose(-1, -2), out=_corners(between, s))
    return Decays(between, from_start, to_end, from_start[..., -1:, :])


def _spans_of_products(factors: Tensor, from_start: Tensor, to_end: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Spans of 2s tokens in a chunk of c, for s = 1, 2, 4, ... c / 2: what leads from the earlier to the later half.

    Yields s, the products from the middle to each token of the later half, inclusive, and those from each token of the
    earlier half, exclusive, to the middle: (b, H, T, n, s, D'). In the end `from_start` and `to_end` hold the products
    of the whole chunk. Factors only ever multiply.
    """
    from_start.copy_(factors)
    to_end.fill_(1.0)
    s = 1
    while s < factors.shape[-2]:
        earlier_before, later_before = _spans(from_start, s)
        earlier_after, _ = _spans(to_end, s)
        yield s, later_before, earlier_after
        earlier_after.mul_(later_before[..., -1:, :])
        later_before.mul_(earlier_before[..., -1:, :])
        s *= 2


class HalvingGrads(NamedTuple):
    """Gradients that a halving passes on: of the scores (given), of q and k (added to), and by level, for decays."""

    scores: Tensor
    q: Tensor
    k: Tensor
    levels: list[tuple[Tensor, Tensor]]


def scores_by_halving(
    q: Tensor, k: Tensor, factors: Tensor, buffers: Buffers, grads: HalvingGrads | None
) -> tuple[Tensor, Decays]:
    """Scores (b, H, T, c, c) and decays of a chunk with one factor per channel (b, H, T, c, D); c is a power of two.

    Spans of 2s tokens are built of two of s: the queries of the later one reach the keys of the earlier one through
    the middle, with the products `from_start` of the later and `to_end` of the earlier, both local to their span.
    """
    from_start, to_end = buffers("from start", *factors.shape), buffers("to end", *factors.shape)
    scores = buffers("scores", *q.shape[:-1], q.shape[-2]).zero_()
    scores.diagonal(0, -2, -1).copy_(torch.mul(q, k, out=buffers("product", *q.shape)).sum(-1))
    if grads is not None:
        diagonal = grads.scores.diagonal(0, -2, -1).unsqueeze(-1)
        torch.mul(diagonal, k, out=grads.q)
        torch.mul(diagonal, q, out=grads.k)
    for s, later_before, earlier_after in _spans_of_products(factors, from_start, to_end):
        later, earlier = _spans(q, s)[1] * later_before, _spans(k, s)[0] * earlier_after
        _corners(scores, s).copy_(_pairs(later, earlier))
        if grads is not None:
            corner = _corners(grads.scores, s).contiguous()
            later_grad, earlier_grad = corner @ earlier, corner.transpose(-1, -2) @ later
            _spans(grads.q, s)[1].addcmul_(later_grad, later_before)
            _spans(grads.k, s)[0].addcmul_(earlier_grad, earlier_after)
            grads.levels.append((later_grad.mul_(later), earlier_grad.mul_(earlier)))
    return scores, Decays(None, from_start, to_end, from_start[..., -1, :, None])


def halving_back(from_start: Tensor, to_end: Tensor, levels: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradient of the decays' logarithms, from those of the logarithms of `from_start` and `to_end` (overwritten)."""
    for later_grad, earlier_grad in reversed(levels):
        s = later_grad.shape[-2]
        earlier_before, later_before = _spans(from_start, s)
        earlier_after, _ = _spans(to_end, s)
        earlier_before[..., -1, :] += later_before.sum(-2)
        later_before[..., -1, :] += earlier_after.sum(-2)
        later_before += later_grad
        earlier_after += earlier_grad
    return from_start


def _spans(x: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """The earlier and the later halves (b, H, T, n, s, D) of the spans of 2s tokens."""
    halves = x.unflatten(-2, (-1, 2, s))
    return halves[..., 0, :, :], halves[..., 1, :, :]


def _corners(scores: Tensor, s: int) -> Tensor:
    """The lower left blocks (b, H, T, n, s, s) of the spans of 2s tokens, as a view."""
    spans = scores.unflatten(-1, (-1, 2, s)).unflatten(-4, (-1, 2, s))
    return spans.diagonal(0, -6, -3)[..., 1, :, 0, :, :].movedim(-1, -3)


def _pairs(later: Tensor, earlier: Tensor) -> Tensor:
    if later.shape[-2] == 1:
        return (later * earlier).sum(-1, keepdim=True)
    return later @ earlier.transpose(-1, -2)


def load_factors(factors: Tensor, piece: Piece, size: int, buffers: Buffers) -> Tensor:
    """(b, H, T, size, D'); the same for every token where the decay does not vary."""
    _, H, _, D = factors.shape
    if not varies(factors):
        factors = factors.expand(piece.last_row, H, piece.stop, D)
    return buffers.load("factors", factors, piece, H, size=size, pad=1.0)


def occurrences(terms: Tensor) -> Tensor:
    """For each token t of a chunk the sum of the terms (i, j) in which its decay occurs: j < t <= i."""
    ones = torch.ones(terms.shape[-1], terms.shape[-1], dtype=terms.dtype, device=terms.device)
    return (terms @ ones.triu(1)).mul_(ones.tril()).sum(-2)
