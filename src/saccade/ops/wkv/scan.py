"""Sums of decayed exponentials over the tokens before and after each token, by scans of logarithmic depth, in torch.

A sum over tokens, seen from a place behind them, is

    sum_i e^(k_i - w d_i) x_i = e^(key - w age) sum        with (key, age) of its largest term, so that all is finite

One place on, every d_i grows by 1: age does, and nothing else. Two such sums are joined by one exponential that is at
most 1, of the difference of their largest terms. Moments, sum_i (d_i - age) e^(k_i - w d_i) x_i, are what the slope by
w needs: the distances are counted from that of the largest term, so that it adds nothing to them.

A tensor of sums has rows: key, age, the sums of each x, and their moments where `moments` says so.

Shape letters: R rows, B batch (chunks of it), T tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["EMPTY", "around", "join", "later"]

#: the key of a sum without terms: less than any other, and finite
EMPTY = -1e30


def around(tokens_RBTC: Tensor, w_C: Tensor, chunk: int, shift: int, moments: bool) -> Tensor:
    """For each token the sums over all others; T is whole chunks.

    Their distance is |t - i| - 1 for those before it in its chunk, and |t - i| - shift for the rest.

    Args:
        tokens_RBTC: each alone, seen from its own place.
        w_C: the decay.
        chunk: tokens of a chunk.
        shift: 0 or 1.
        moments: whether there are moments among the rows.
    """
    R, B, T, C = tokens_RBTC.shape
    after = later(_before(_scan(tokens_RBTC.flip(2), w_C, 1, moments)).flip(2), 1 - shift)
    inside = _scan(tokens_RBTC.reshape(R, -1, chunk, C), w_C, 1, moments)
    before = _before(inside).view(R, B, T, C)
    if chunk < T:
        past = _before(_scan(inside[:, :, -1].view(R, B, -1, C), w_C, chunk, moments))
        place = torch.arange(1 - shift, chunk + 1 - shift, device=w_C.device, dtype=w_C.dtype)[:, None]
        past = later(past[:, :, :, None].expand(R, B, T // chunk, chunk, C), place)
        before = join(past.reshape(R, B, T, C), before, w_C, moments)
    return join(before, after, w_C, moments)


def later(s_RBTC: Tensor, steps: int | Tensor) -> Tensor:
    """Seen from so many places farther on."""
    return torch.cat([s_RBTC[:1], s_RBTC[1:2] + steps, s_RBTC[2:]])


def join(a_RBTC: Tensor, b_RBTC: Tensor, w_C: Tensor, moments: bool) -> Tensor:
    """The sums of both, which are seen from the same place."""
    keys, ages = a_RBTC[:2] - b_RBTC[:2]
    gap = keys - w_C * ages
    first, less = gap > 0, (-gap.abs()).exp()
    of_a, of_b = torch.where(first, 1.0, less), torch.where(first, less, 1.0)
    sums = of_a * a_RBTC[2:] + of_b * b_RBTC[2:]
    if moments:  # those of one of the two are counted from another term now
        x, m = sums.chunk(2)
        a, b = (rows[2 : 2 + len(x)] for rows in (a_RBTC, b_RBTC))
        sums = torch.cat([x, m + torch.where(first, -of_b * b, of_a * a) * ages])
    return torch.cat([torch.where(first, a_RBTC[:2], b_RBTC[:2]), sums])


def _scan(s: Tensor, w: Tensor, span: int, moments: bool) -> Tensor:
    """Up to each place, itself included; a place is `span` tokens. Twice the work of one sum, in log2(T) steps."""
    places = s.shape[2]
    if places == 1:
        return s
    even, odd, alone = s[:, :, ::2], s[:, :, 1::2], s[:, :, 2::2]
    done = _scan(join(later(even[:, :, : places // 2], span), odd, w, moments), w, 2 * span, moments)
    out = torch.empty_like(s, memory_format=torch.contiguous_format)
    out[:, :, :1], out[:, :, 1::2] = even[:, :, :1], done
    out[:, :, 2::2] = join(later(done[:, :, : alone.shape[2]], span), alone, w, moments)
    return out


def _before(s: Tensor) -> Tensor:
    """What stands before each place: nothing before the first."""
    first = torch.zeros_like(s[:, :, :1])
    first[0] = EMPTY
    return torch.cat([first, s[:, :, :-1]], 2)
