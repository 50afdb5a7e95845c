"""Moving averages, the selective scan and WKV on a sequence in parts, by the states of `saccade.parallel.states`.

Shape letters: B batch, N or T tokens of this rank, C channels, E averages or S states of a channel, G groups of
channels; P pieces of all ranks, in the order of the sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.ema import turned
from saccade.ops.neighbours import with_neighbours
from saccade.parallel import halos
from saccade.parallel.context import Shards
from saccade.parallel.states import Pieces, entering, joined

#: the logarithm of a weight that is none
_NOTHING = -1e30


@torch.compiler.disable
def ema(
    shards: Shards,
    function: Callable[..., Any],
    x_BNC: Tensor,
    decay_CE: Tensor,
    weight_CE: Tensor,
    mix_CE: Tensor,
    **options: Any,
) -> Any:
    """This rank's rows of `saccade.ops.ema.ema`.

    Args:
        shards: the ranks.
        function: `ema`.
        x_BNC, decay_CE, weight_CE, mix_CE: its arguments; x is this rank's part.
        options: its options.

    Raises:
        ValueError: where `ema` does.
    """
    given, return_state = options.pop("state", None), options.pop("return_state", False)
    taps = options.pop("taps", None)
    backwards, coefficients = options.pop("backwards", 0), (decay_CE, weight_CE, mix_CE)
    # what is wrong with the options is wrong with them for no token
    nothing = {"state": given, "return_state": return_state, "taps": taps, "backwards": backwards}
    function(x_BNC[:, :0].detach(), *coefficients, **nothing, **options)
    forwards = x_BNC.shape[2] - backwards
    if taps is not None:
        return _cut_average(shards, function, x_BNC, coefficients, taps, forwards)
    pieces, summaries = Pieces(shards, x_BNC.shape[1]), []
    for piece in pieces.own:
        x = turned(x_BNC[:, piece.tokens], backwards)
        _, left = function(x, *coefficients, return_state=True, **options)
        summaries.append([left, (decay_CE.to(left.dtype) ** x.shape[1])])
    states, decays = pieces.gathered(summaries)
    decays, rows = decays[:, None], []
    for piece in pieces.own:
        before = entering(states[:, :, :forwards], decays[:, :, :forwards], piece.place, given)
        if backwards:
            later_states, later_decays = (each[:, :, forwards:].flip(0) for each in (states, decays))
            before = torch.cat([before, entering(later_states, later_decays, len(states) - 1 - piece.place)], 1)
        y = function(turned(x_BNC[:, piece.tokens], backwards), *coefficients, state=before, **options)
        rows.append(turned(y, backwards))
    out = joined(rows, 1)
    return (out, entering(states, decays, len(states), given)) if return_state else out


def _cut_average(
    shards: Shards, function: Callable[..., Any], x: Tensor, coefficients: tuple[Tensor, ...], taps: int, forwards: int
) -> Tensor:
    """The average whose kernel is cut, from the tokens that it reaches."""
    reach, outs = reach_of(taps, shards.whole(x.shape[1])), []
    if forwards:
        ahead = [p[:forwards] for p in coefficients]
        near = lambda x: function(x, *ahead, taps=taps)[:, reach:]  # noqa: E731
        outs.append(halos.with_neighbours(shards, with_neighbours, near, x[..., :forwards], reach))
    if forwards < x.shape[2]:
        behind, count = [p[forwards:] for p in coefficients], x.shape[2] - forwards
        near = lambda x: function(x, *behind, taps=taps, backwards=count)[:, : x.shape[1] - reach]  # noqa: E731
        outs.append(halos.with_neighbours(shards, with_neighbours, near, x[..., forwards:], 0, reach))
    return joined(outs, 2)


def reach_of(taps: int, tokens: int) -> int:
    """How many tokens before its own a kernel that is cut looks at.

    Args:
        taps: to which it is cut.
        tokens: of the whole sequence.
    """
    return min(taps, max(1, tokens)) - 1


@torch.compiler.disable
def selective_scan(
    shards: Shards,
    function: Callable[..., Any],
    u_BTC: Tensor,
    delta_BTC: Tensor,
    a_CS: Tensor,
    b_BTGS: Tensor,
    c_BTGS: Tensor,
    skip_C: Tensor | None = None,
) -> Tensor:
    """This rank's rows of `selective_scan`.

    States are written and read by tokens beside those of a piece. S tokens of step 0 behind it, whose C are the unit
    vectors, read what it leaves. S tokens before it write what enters: of step d, whose B are the unit vectors, and
    whose input is the state over d, less what the writing tokens behind take of it.

    Args:
        shards: the ranks.
        function: `selective_scan`.
        u_BTC, delta_BTC, a_CS, b_BTGS, c_BTGS, skip_C: its arguments; what is per token is this rank's part.

    Raises:
        ValueError: where `selective_scan` does.
    """
    wide = working_dtype(u_BTC.dtype)
    u, delta, a, b, c = (x.to(wide) for x in (u_BTC, delta_BTC, a_CS, b_BTGS, c_BTGS))
    if b.ndim == 3:
        b, c = b[:, :, None], c[:, :, None]
    (B, T, C), (G, S) = u.shape, b.shape[2:]
    pieces = Pieces(shards, T)
    units = torch.eye(S, dtype=wide, device=u.device)[None, :, None].expand(B, S, G, S)
    none_BSC, none_BSGS = u.new_zeros(B, S, C), units.new_zeros(B, S, G, S)
    summaries = []
    for piece in pieces.own:
        x, step, enter = (t[:, piece.tokens] for t in (u, delta, b))
        read = torch.cat([enter.new_zeros(enter.shape), units], 1)
        rows = (torch.cat([t, zero], 1) for t, zero in ((x, none_BSC), (step, none_BSC)))
        left_BSC = function(*rows, a, torch.cat([enter, none_BSGS], 1), read)[:, x.shape[1] :]
        summaries.append([left_BSC.mT, (step.sum(1)[..., None] * a).exp()])
    states, decays = pieces.gathered(summaries)
    # the writing tokens take at most a factor e of each other's
    d = 1 / (1 + S * a.detach().abs().max())
    behind_S1 = torch.arange(S - 1, -1, -1, device=u.device, dtype=wide)[:, None]
    kept_SC = (behind_S1 * d * a.mT).exp()
    outs = []
    for piece in pieces.own:
        state_BCS = entering(states, decays, piece.place)
        x, step, enter, read = (t[:, piece.tokens] for t in (u, delta, b, c))
        written_BSC = state_BCS.mT / (d * kept_SC)
        x = torch.cat([written_BSC, x], 1)
        step = torch.cat([d.expand(B, S, C), step], 1)
        outs.append(function(x, step, a, torch.cat([units, enter], 1), torch.cat([none_BSGS, read], 1))[:, S:])
    y = joined(outs, 1)
    return (y if skip_C is None else y + skip_C.to(wide) * u).to(u_BTC.dtype)


@torch.compiler.disable
def wkv(
    shards: Shards,
    function: Callable[..., Any],
    k_BTC: Tensor,
    v_BTC: Tensor,
    decay_C: Tensor,
    bonus_C: Tensor,
    **options: Any,
) -> Tensor:
    """This rank's rows of `wkv`.

    All that lies before a piece weighs as one token would that stands right before it, and all behind it likewise:

        k = log sum_i exp(k_i - w d_i),   v = sum_i exp(k_i - w d_i - k) v_i,   d_i from that place

    Args:
        shards: the ranks.
        function: `wkv`.
        k_BTC, v_BTC, decay_C, bonus_C: its arguments; keys and values are this rank's part.
        options: its options.

    Raises:
        ValueError: where `wkv` does, or for `distance="kernel"`, whose chunks are of the whole.
    """
    published_only(options.get("distance", "published"))
    wide = working_dtype(v_BTC.dtype)
    k, v, w, bonus = (x.to(wide) for x in (k_BTC, v_BTC, decay_C, bonus_C))
    pieces = Pieces(shards, k.shape[1])
    summaries = []
    for piece in pieces.own:
        x, y = k[:, piece.tokens], v[:, piece.tokens]
        away_T1 = torch.arange(x.shape[1], device=k.device, dtype=wide)[:, None]
        summaries.append([*_as_one(x - w * away_T1.flip(0), y), *_as_one(x - w * away_T1, y)])
    last_k, last_v, first_k, first_v = pieces.gathered(summaries)
    ends = torch.tensor([[span.start, span.stop - 1] for span in pieces.spans], dtype=wide, device=k.device)
    outs = []
    for piece in pieces.own:
        x, y = k[:, piece.tokens], v[:, piece.tokens]
        before = (piece.start - 1 - ends[: piece.place, 1])[:, None, None] * w
        behind = (ends[piece.place + 1 :, 0] - piece.start - x.shape[1])[:, None, None] * w
        one = _as_one((last_k[: piece.place] - before).transpose(0, 1), last_v[: piece.place].transpose(0, 1))
        other = _as_one(
            (first_k[piece.place + 1 :] - behind).transpose(0, 1), first_v[piece.place + 1 :].transpose(0, 1)
        )
        keys, values = (torch.cat([a[:, None], z, e[:, None]], 1) for a, z, e in zip(one, (x, y), other))
        outs.append(function(keys, values, w, bonus, **options)[:, 1:-1])
    return joined(outs, 1).to(v_BTC.dtype)


def published_only(distance: str) -> None:
    """Refuse another distance of `wkv`.

    Args:
        distance: that.

    Raises:
        ValueError: if it is another.
    """
    if distance != "published":
        raise ValueError('wkv in parts takes distance="published" alone: the chunks of "kernel" are of the whole')


def _as_one(k_BTC: Tensor, v_BTC: Tensor) -> tuple[Tensor, Tensor]:
    """The token (B, C) that weighs as much as all, and their mean value; the weight is nothing where there are none."""
    nothing = k_BTC.new_full((k_BTC.shape[0], 1, k_BTC.shape[2]), _NOTHING)
    keys = torch.cat([nothing, k_BTC.clamp(min=_NOTHING)], 1)
    weights = keys.softmax(1)
    return keys.logsumexp(1), (weights[:, 1:] * v_BTC).sum(1)
