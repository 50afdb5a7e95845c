"""Recurrences on a sequence in parts: linear attention with every decay, expanded linear attention.

What came before a part reaches it as a state, however long it was. Each part p makes the state that it alone leaves
behind, S_p, and the product of its decays, A_p; every rank gets all of them (one all-gather, whose size does not depend
on the length), and puts together what enters its own parts:

    S_in(p) = sum_{j<p} (prod_{j<t<p} A_t) S_j  +  (prod_{t<p} A_t) S_given

Backward, the gradients of the states go back to those whose they are.

Shape letters: B batch, H query heads, K key heads, N tokens of this rank, n of a piece, D feature width, E width of
values; T tokens, C channels, G groups of them, S states of a channel; M keys; P pieces of all ranks, in the order of
the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops.autocast import one_type, working_dtype
from saccade.ops.heads import repeat_heads
from saccade.ops.linear.inputs import apply_features, as_factors, check, enter_state, leave_state
from saccade.parallel.context import Shards
from saccade.parallel.exchange import gather

KIND = "states"


class Piece(NamedTuple):
    """Tokens of this rank that follow one another in the sequence.

    Attributes:
        place: which of all pieces it is.
        tokens: where this rank holds them.
        start: the first in the whole sequence.
    """

    place: int
    tokens: slice
    start: int


class Pieces:
    """The pieces of all ranks in the order of the sequence, and which are this rank's.

    Args:
        shards: the ranks.
        n: tokens that this one holds.
    """

    def __init__(self, shards: Shards, n: int) -> None:
        self.shards, layout = shards, shards.layouts(n)[0]
        slots = layout.slots
        spans = []
        for rank in range(shards.ranks):
            held = list(layout.pieces(rank))
            spans += held + [range(layout.length, layout.length)] * (slots - len(held))
        self.order = sorted(range(len(spans)), key=lambda slot: (spans[slot].start, spans[slot].stop))
        self.spans = [spans[slot] for slot in self.order]
        self.own, begin = [], 0
        for slot in range(shards.rank * slots, (shards.rank + 1) * slots):
            length = len(spans[slot])
            self.own.append(Piece(self.order.index(slot), slice(begin, begin + length), spans[slot].start))
            begin += length

    def gathered(self, summaries: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """What all pieces leave behind, each of it stacked in front (P, ...), in the order of the sequence.

        Args:
            summaries: of each of this rank's pieces, tensors of the same shapes on all ranks.
        """
        flat = torch.stack([torch.cat([x.reshape(-1) for x in one]) for one in summaries])
        whole = gather(self.shards, flat, KIND).flatten(0, 1)[self.order]
        shapes = [x.shape for x in summaries[0]]
        parts = whole.split([shape.numel() for shape in shapes], -1)
        return [part.unflatten(-1, shape) if len(shape) else part[..., 0] for part, shape in zip(parts, shapes)]


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """This rank's pieces one after the other; a single one as it is.

    Args:
        parts: at least one.
        dim: the axis of tokens.
    """
    return torch.cat(list(parts), dim) if len(parts) > 1 else parts[0]


def entering(states: Tensor, decays: Tensor | None, place: int, given: Tensor | None = None) -> Tensor:
    """S_in of the equation at the top of this file.

    Args:
        states: S_p, (P, ...).
        decays: A_p, (P, ...), broadcast to them; none decay where None.
        place: p; P for what the whole sequence leaves behind.
        given: what came before the first piece.
    """
    states = states[:place]
    if decays is None:
        found = states.sum(0)
        return found if given is None else found + given
    decays = decays[:place]
    after = torch.cat([decays[1:], torch.ones_like(decays[:1])])[:place]
    after = after.flip(0).cumprod(0).flip(0)
    found = (states * after.to(states.dtype)).sum(0)
    return found if given is None else found + decays.prod(0).to(given.dtype) * given


@torch.compiler.disable
def linear_attend(
    shards: Shards, function: Callable[..., Any], q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, **options: Any
) -> Any:
    """This rank's rows of `saccade.linear_attend`; a state that is given or returned is of the whole sequence.

    Args:
        shards: the ranks.
        function: `saccade.linear_attend`.
        q_BHND, k_BKMD, v_BKME: this rank's part.
        options: those of `saccade.linear_attend`; what is given per token is this rank's part.

    Raises:
        ValueError: where `saccade.linear_attend` does.
    """
    q, k, v = one_type(q_BHND, k_BKMD, v_BKME)
    causal, normalize = options.get("causal", True), bool(options.get("normalize", False))
    decay, state = options.pop("decay", None), options.pop("state", None)
    check(q, k, v, causal, decay, options.get("chunk_size"))
    if (feature_map := options.pop("feature_map", None)) is not None:
        q, k = apply_features(feature_map, q, k)
    (B, H, N, D), E = q.shape, v.shape[3]
    given = None if state is None else enter_state(state, (B, H, D, E), normalize, q)
    return_state = options.pop("return_state", False)
    if not causal:
        left = _left(k, v, None, normalize)
        own, total = repeat_heads(left, H), repeat_heads(gather(shards, left, KIND).sum(0), H)
        total = total if given is None else total + given
        out = function(q, k, v, state=leave_state(total - own, normalize), **options)
        return (out, leave_state(total, normalize)) if return_state else out

    pieces, factors = Pieces(shards, N), as_factors(decay, (B, H, N, D), q)
    if factors is not None:
        factors = torch.where(factors == 0, factors.detach(), factors)  # a 0 gets no gradient
    summaries, parts = [], []
    for piece in pieces.own:
        x, y = k[:, :, piece.tokens], v[:, :, piece.tokens]
        constant = factors is not None and factors.shape[2] == 1 and N > 1
        steps = factors if factors is None or constant else factors[:, :, piece.tokens]
        remains, whole = _remains(steps, x.shape[2])
        left = _left(x if remains is None else repeat_heads(x, H), y, remains, normalize)
        summaries.append([left] if whole is None else [left, whole.to(left.dtype)])
        parts.append((q[:, :, piece.tokens], x, y, steps))
    states, *decays = pieces.gathered(summaries)
    states = repeat_heads(states.flatten(0, 1), H).unflatten(0, states.shape[:2])
    products = decays[0] if decays else None
    rows = []
    for piece, (a, x, y, steps) in zip(pieces.own, parts):
        before = leave_state(entering(states, products, piece.place, given), normalize)
        rows.append(function(a, x, y, decay=_as_decay(decay, steps), state=before, **options))
    out = joined(rows, 2)
    if not return_state:
        return out
    return out, leave_state(entering(states, products, len(states), given), normalize)


def _as_decay(decay: Any, steps: Tensor | None) -> Any:
    """What the user gave, for the tokens of a piece."""
    return steps if isinstance(decay, Tensor) and decay.ndim > 2 else decay


def _remains(factors: Tensor | None, n: int) -> tuple[Tensor | None, Tensor | None]:
    """What is left at a piece's end of each of its tokens, (B, H, n, D), and of all before it, (B, H, D, 1); broadcast.

    Args:
        factors: of `as_factors`.
        n: tokens of the piece.
    """
    if factors is None:
        return None, None
    if factors.shape[2] == 1 and n != 1:
        remaining = torch.arange(n - 1, -1, -1, device=factors.device, dtype=factors.dtype)
        return factors ** remaining[:, None], (factors**n).mT
    after = torch.cat([factors[:, :, 1:], torch.ones_like(factors[:, :, :1])], 2)[:, :, :n]
    return after.flip(2).cumprod(2).flip(2), factors.prod(2, keepdim=True).mT


def _left(k: Tensor, v: Tensor, remains: Tensor | None, normalize: bool) -> Tensor:
    """The state that tokens leave behind, (B, K, D, E); one column more where normalised."""
    dtype = working_dtype(k.dtype)
    k, v = k.to(dtype), v.to(dtype)
    if remains is not None:
        k, v = k * remains.to(dtype), repeat_heads(v, k.shape[1])
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    return k.mT @ v


@torch.compiler.disable
def expanded_attend(
    shards: Shards,
    function: Callable[..., Any],
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHME: Tensor,
    expansion: Any,
    **options: Any,
) -> Any:
    """This rank's rows of `expanded_attend`; a state that is given or returned is of the whole sequence.

    Args:
        shards: the ranks.
        function: `expanded_attend`.
        q_BHND, k_BHMD, v_BHME: this rank's part.
        expansion, options: as there.

    Raises:
        ValueError: where `expanded_attend` does.
    """
    causal, given = options.pop("causal", True), options.pop("state", None)
    return_state = options.pop("return_state", False)
    if not causal and (given is not None or return_state):
        raise ValueError("a state needs causal=True")
    pieces, summaries = Pieces(shards, k_BHMD.shape[2]), []
    for piece in pieces.own:
        k, v = k_BHMD[:, :, piece.tokens], v_BHME[:, :, piece.tokens]
        summaries.append([function(k, k, v, expansion, return_state=True, **options)[1]])
    (states,) = pieces.gathered(summaries)
    total = entering(states, None, len(states), given)
    if not causal:  # a state and tokens that say nothing
        nothing = v_BHME.new_zeros(*q_BHND.shape[:3], v_BHME.shape[3])
        return function(q_BHND, q_BHND, nothing, expansion, state=total, **options)
    rows = []
    for piece in pieces.own:
        q, k, v = (x[:, :, piece.tokens] for x in (q_BHND, k_BHMD, v_BHME))
        before = entering(states, None, piece.place, given)
        rows.append(function(q, k, v, expansion, state=before, **options))
    out = joined(rows, 2)
    return (out, total) if return_state else out
