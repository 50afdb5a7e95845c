"""Linear attention: feature maps instead of a softmax, optional decay, time linear in the number of tokens.

    o_i = sum_{j<=i} (prod_{t=j+1..i} decay_t) (q_i . k_j) v_j                       causal
    o_i = sum_j (q_i . k_j) v_j                                                      not causal
    normalised: o_i divided by the same sum with v_j = 1

The causal form runs by chunks: inside a chunk a masked product with the decays between its tokens, between chunks a
state S = sum_j (decays after j) k_j^T v_j. Decays only ever multiply, over spans that begin after j and end at i, so
that nothing is divided by a cumulative product and any decay in (0, 1] is safe over any length. Where they vary by
token or channel a chunk is built by halving: what reaches from the earlier to the later half of a span of 2s tokens is
(products to the middle) x (products from the middle), an outer product for a factor per head, and
(q * products from the middle) (k * products to the middle)^T for a factor per channel; then s doubles.

Backward recomputes each piece from its inputs and from the state before it; nothing of size N x N or N x D x E exists.
Gradients of decays are sums of the very terms in which the decay occurs, never differences of large sums.

Shape letters: B batch, H query heads, K key heads (K divides H), N queries, M keys, D feature width, E value width
(one wider inside where normalised: a column of ones carries the denominator), T chunks of a piece, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from saccade.ops import native
from saccade.ops.autocast import exact, one_type
from saccade.ops.export import exporting
from saccade.ops.grad import first_derivatives_only, needs_grad
from saccade.ops.heads import refuse_strangers, repeat_heads
from saccade.ops.memory import HUGE_FROM, large_empty
from saccade.ops.native.linear import attend_chunks
from saccade.ops.scratch import Scratch, scratch

__all__ = ["LinearState", "linear_attend", "linear_attend_reference", "linear_step"]

FeatureMap = Callable[[Tensor], Tensor]


class LinearState(NamedTuple):
    """What normalised linear attention keeps of the past: kv (B, H, D, E) = sum k^T v, and z (B, H, D) = sum k."""

    kv: Tensor
    z: Tensor


def linear_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    feature_map: FeatureMap | None = None,
    decay: float | Tensor | None = None,
    causal: bool = True,
    normalize: bool = False,
    scale: float | None = None,
    state: Tensor | LinearState | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """Linear attention, see the equations at the top of this file.

    Args:
        q_BHND, k_BKMD, v_BKME: queries, keys, values; K divides H; N = M where causal.
        feature_map: applied to queries and keys, D -> any width; None leaves them as they are.
        decay: factors in (0, 1]: None, a float, (H,), (H, D); or per token (B, H, N), (B, H, N, D), where an axis may
            be 1. D is the width after the feature map. A 0 forgets all that came before (and gets no gradient).
        causal: token i sees tokens j <= i; otherwise all see all, and there is no decay.
        normalize: divide by the sum of the weights; a row whose sum is 0 gives zeros.
        scale: factor of q . k; None is 1 (it matters only where not normalised).
        state: what came before these tokens, as returned by an earlier call: a tensor (B, H, D, E), or a `LinearState`
            where normalised. It decays with the tokens like all that came before.
        return_state: also return the state after the last token: float32 (float64 for float64 inputs), of the same
            type as `state`.
        chunk_size: tokens of a chunk in the causal form (a power of two where decay is per channel); the result does
            not depend on it. None: 128, or 64 where decays vary.

    Returns:
        out (B, H, N, E), or (out, state).

    Raises:
        ValueError: if shapes, dtypes or decay do not fit, or a decay is given where not causal.

    >>> import torch
    >>> q, k, v = torch.ones(1, 1, 4, 1), torch.ones(1, 1, 4, 1), torch.ones(1, 1, 4, 1)
    >>> linear_attend(q, k, v, decay=0.5).flatten().tolist()
    [1.0, 1.5, 1.75, 1.875]
    """
    q_BHND, k_BKMD, v_BKME = one_type(q_BHND, k_BKMD, v_BKME)
    _check(q_BHND, k_BKMD, v_BKME, causal, decay, chunk_size)
    if feature_map is not None:
        q_BHND, k_BKMD = _features(feature_map, q_BHND, k_BKMD)
    scale = 1.0 if scale is None else float(scale)
    (B, H, N, D), E = q_BHND.shape, v_BKME.shape[3]
    if not causal:
        sums = None if state is None else _enter_state(state, (B, H, D, E), normalize, q_BHND)
        out, after = _all_to_all(q_BHND, k_BKMD, v_BKME, sums, scale, normalize)
    else:
        before = _enter_state(state, (B, H, D, E), normalize, q_BHND)
        factors = _as_factors(decay, (B, H, N, D), q_BHND)
        inputs = (q_BHND, k_BKMD, v_BKME, before, factors)
        keep = needs_grad(*inputs)
        if chunk_size is None:
            chunk_size = 128 if factors is None or factors.shape[2:] == (1, 1) else 64
        if exporting() and state is None and not return_state:
            return _all_pairs(q_BHND, k_BKMD, v_BKME, factors, scale, normalize)
        out, _, _, after = torch.ops.saccade.linear_chunked(*inputs, scale, normalize, chunk_size, keep)
    return (out, _leave_state(after, normalize)) if return_state else out


def retention_decay(num_heads: int) -> Tensor:
    """RetNet's decays (H,): 1 - 2^-5, 1 - 2^-6, ...

    >>> retention_decay(2).tolist()
    [0.96875, 0.984375]
    """
    return 1 - torch.exp2(-5.0 - torch.arange(num_heads))


def linear_step(
    q_BH1D: Tensor,
    k_BK1D: Tensor,
    v_BK1E: Tensor,
    state: Tensor | LinearState | None = None,
    *,
    feature_map: FeatureMap | None = None,
    decay: float | Tensor | None = None,
    normalize: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Any]:
    """One token: S <- decay S + k^T v, o = q S. Arguments as in `linear_attend` with N = 1.

    Returns:
        out (B, H, 1, E) and the new state; cost and memory do not depend on how many tokens came before.

    Raises:
        ValueError: as `linear_attend`, or if there is not exactly one token.
    """
    _check(q_BH1D, k_BK1D, v_BK1E, True, decay, None)
    if q_BH1D.shape[2] != 1:
        raise ValueError(f"linear_step takes one token, got {q_BH1D.shape[2]}")
    if feature_map is not None:
        q_BH1D, k_BK1D = _features(feature_map, q_BH1D, k_BK1D)
    (B, H, _, D), E = q_BH1D.shape, v_BK1E.shape[3]
    state = _enter_state(state, (B, H, D, E), normalize, q_BH1D)
    factors = _as_factors(decay, (B, H, 1, D), q_BH1D)
    q, k, v = (x.to(state.dtype) for x in (q_BH1D, k_BK1D, v_BK1E))
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    new = repeat_heads(k.transpose(2, 3) * v, H)
    state = new + (state if factors is None else factors.transpose(2, 3).to(state.dtype) * state)
    out = (q * (1.0 if scale is None else scale)) @ state
    if normalize:
        out = _divide(out)[0]
    return out.to(q_BH1D.dtype), _leave_state(state, normalize)


def linear_attend_reference(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    *,
    feature_map: FeatureMap | None = None,
    decay: float | Tensor | None = None,
    causal: bool = True,
    normalize: bool = False,
    scale: float | None = None,
    state: Tensor | LinearState | None = None,
    return_state: bool = False,
) -> Any:
    """`linear_attend`, slow and obvious: token after token. The oracle of the tests."""
    _check(q_BHND, k_BKMD, v_BKME, causal, decay, None)
    if feature_map is not None:
        q_BHND, k_BKMD = _features(feature_map, q_BHND, k_BKMD)
    B, H, N, D = q_BHND.shape
    E = v_BKME.shape[3]
    S = _enter_state(state, (B, H, D, E), normalize, q_BHND)
    factors = _as_factors(decay, (B, H, N, D), q_BHND)
    q = q_BHND.to(S.dtype) * (1.0 if scale is None else scale)
    k, v = repeat_heads(k_BKMD.to(S.dtype), H), repeat_heads(v_BKME.to(S.dtype), H)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    rows = []
    if not causal:
        S = S + k.transpose(2, 3) @ v
        rows = [q[:, :, i] for i in range(N)]
        rows = [torch.einsum("bhd,bhde->bhe", row, S) for row in rows]
    else:
        for i in range(N):
            if factors is not None:
                S = S * factors[:, :, min(i, factors.shape[2] - 1), :, None].to(S.dtype)
            S = S + k[:, :, i, :, None] * v[:, :, i, None, :]
            rows.append(torch.einsum("bhd,bhde->bhe", q[:, :, i], S))
    out = torch.stack(rows, 2) if rows else q.new_zeros(B, H, 0, S.shape[3])
    if normalize:
        out = _divide(out)[0]
    out = out.to(q_BHND.dtype)
    return (out, _leave_state(S, normalize)) if return_state else out


# The front door


def _check(q: Tensor, k: Tensor, v: Tensor, causal: bool, decay: float | Tensor | None, chunk_size: int | None) -> None:
    refuse_strangers(q, k, v)
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"key and value must agree in batch, heads and tokens, got {tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"query and key must agree in batch and head_dim, got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"the key heads must divide the query heads ({q.shape[1]}), got {k.shape[1]}")
    if causal and k.shape[2] != q.shape[2]:
        raise ValueError(f"causal linear attention needs as many keys as queries, got {q.shape[2]} and {k.shape[2]}")
    if not causal and decay is not None:
        raise ValueError("decay needs causal=True: without an order of tokens nothing decays")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")


def _features(feature_map: FeatureMap, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    mapped = feature_map(q), feature_map(k)
    for before, after in zip((q, k), mapped, strict=True):
        if after.shape[:-1] != before.shape[:-1]:
            raise ValueError(
                f"feature_map must keep all axes but the last, got {tuple(after.shape)} from {tuple(before.shape)}"
            )
    return mapped


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _enter_state(
    state: Tensor | LinearState | None, shape: tuple[int, int, int, int], normalize: bool, q: Tensor
) -> Tensor:
    """(B, H, D, E) in the accumulator's dtype; where normalised z stands in one more column."""
    dtype = _accumulator(q.dtype)
    if state is None:
        return q.new_zeros(*shape[:3], shape[3] + normalize, dtype=dtype)
    if normalize != isinstance(state, LinearState):
        wanted = "a LinearState(kv, z) where normalised" if normalize else "a tensor (B, H, D, E) where not normalised"
        raise ValueError(f"state must be {wanted}, got {type(state).__name__}")
    kv = state.kv if isinstance(state, LinearState) else state
    if kv.shape != shape or (isinstance(state, LinearState) and state.z.shape != shape[:3]):
        raise ValueError(f"state must be (B, H, D, E) = {tuple(shape)}, got {tuple(kv.shape)}")
    kv = kv.to(dtype)
    return torch.cat([kv, state.z.to(dtype)[..., None]], -1) if isinstance(state, LinearState) else kv


def _leave_state(state: Tensor, normalize: bool) -> Tensor | LinearState:
    return LinearState(state[..., :-1], state[..., -1]) if normalize else state


def _as_factors(decay: float | Tensor | None, shape: tuple[int, int, int, int], q: Tensor) -> Tensor | None:
    """Decay as (1, H, 1, 1), (1, H, 1, D), (B, H, N, 1) or (B, H, N, D).

    In the accumulator's dtype, but a factor per head in double: rounding is raised to the power of the length.
    """
    B, H, N, D = shape
    dtype = _accumulator(q.dtype)
    if decay is None:
        return None
    if not isinstance(decay, Tensor):
        if not 0.0 < decay <= 1.0:
            raise ValueError(f"decay must be in (0, 1], got {decay}")
        return torch.full((1, H, 1, 1), float(decay), dtype=torch.float64, device=q.device)
    if not decay.is_floating_point():
        raise ValueError(f"decay must be floating point, got {decay.dtype}")
    if decay.device != q.device:
        raise ValueError(f"decay is on {decay.device}, but query is on {q.device}")
    allowed: dict[int, tuple[int, ...]] = {0: (), 1: (H,), 2: (H, D), 3: (B, H, N), 4: (B, H, N, D)}
    full = allowed.get(decay.ndim)
    if full is None or any(
        got not in ((1, want) if decay.ndim > 2 else (want,)) for got, want in zip(decay.shape, full, strict=True)
    ):
        raise ValueError(
            f"decay must be a number, (H,) = {(H,)}, (H, D) = {(H, D)}, (B, H, N) = {(B, H, N)} or (B, H, N, D), "
            f"got shape {tuple(decay.shape)}"
        )
    decay = decay.to(torch.float64 if decay.ndim < 2 else dtype)
    if decay.ndim == 0:
        return decay.expand(1, H, 1, 1)
    if decay.ndim < 3:
        return decay.view(1, H, 1, -1)
    return (decay[..., None] if decay.ndim == 3 else decay).expand(B, H, N, -1)


def _divide(out: Tensor) -> tuple[Tensor, Tensor]:
    """Numerators over the denominators in the last column, and 1 / denominator; both 0 where that is 0."""
    total = out[..., -1:]
    inverse = torch.where(total == 0, 0.0, 1.0 / torch.where(total == 0, 1.0, total))
    return out[..., :-1] * inverse, inverse


def _in_c(q: Tensor, factors: Tensor | None) -> bool:
    """Whether the C code does it: single precision, and decays that vary with the head alone."""
    return q.dtype == torch.float32 and not _halves(factors) and native.refusal(q.device, q.dtype) is None


def _all_to_all(
    q: Tensor, k: Tensor, v: Tensor, before: Tensor | None, scale: float, normalize: bool
) -> tuple[Tensor, Tensor]:
    given, dtype = q.dtype, _accumulator(q.dtype)
    if given != dtype:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    state = k.mT @ v
    if k.shape[1] != q.shape[1]:
        state = repeat_heads(state, q.shape[1])
    if before is not None:
        state = before + state
    out = _product(q, state if scale == 1.0 else scale * state)
    if normalize:
        out = _divide(out)[0]
    return (out if given == dtype else out.to(given)), state


def _all_pairs(q: Tensor, k: Tensor, v: Tensor, factors: Tensor | None, scale: float, normalize: bool) -> Tensor:
    """The causal form for exporters: each pair's product of factors is a difference of sums of logs."""
    given, (H, N), wide = q.dtype, q.shape[1:3], _accumulator(q.dtype)
    q, k, v = q.to(wide), repeat_heads(k.to(wide), H), repeat_heads(v.to(wide), H)
    if normalize:
        v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    if factors is not None:
        logs = factors.log().expand(-1, -1, N, -1).cumsum(2)
        fading = (logs[:, :, :, None] - logs[:, :, None]).clamp(max=0.0).exp().to(wide)  # (B, H, N, N, 1 or D)
    if factors is None or factors.shape[-1] == 1:
        scores = q @ k.mT * (1.0 if factors is None else fading[..., 0])
    else:
        scores = (q[:, :, :, None] * k[:, :, None] * fading).sum(-1)
    out = scale * scores.tril() @ v
    return (_divide(out)[0] if normalize else out).to(given)


def _product(q: Tensor, state: Tensor) -> Tensor:
    """q S; a large one for inference alone is written to huge pages."""
    shape = (*q.shape[:3], state.shape[3])
    if torch.compiler.is_compiling() or prod(shape) * q.itemsize < HUGE_FROM or q.device.type != "cpu":
        return q @ state
    if torch._C._functorch.maybe_current_level() is not None or needs_grad(q, state):
        return q @ state
    return torch.matmul(q, state, out=large_empty(shape, q.dtype, q.device))


# The causal form, in pieces


class _Piece(NamedTuple):
    """Batch rows `first_row` to `last_row`, tokens `start` to `stop`, as `chunks` chunks of `size`."""

    first_row: int
    last_row: int
    start: int
    stop: int
    chunks: int
    size: int


def _pieces(B: int, H: int, N: int, chunk_size: int, factors: Tensor | None, on_cpu: bool) -> list[list[_Piece]]:
    """Per group of batch rows its pieces in order: few enough chunks at a time to stay in cache (to fill a GPU)."""
    if _halves(factors):
        chunk_size = _power_of_two(chunk_size)
    size = max(1, min(chunk_size, N))
    together = max(1, (_CACHE_ELEMENTS if on_cpu else _DEVICE_ELEMENTS) // (size * size))
    rows = max(1, min(B, together // max(1, H)))
    chunks = max(1, min(N // size, together // max(1, rows * H)))
    groups = []
    for row in range(0, B, rows):
        group, start = [], 0
        while start < N:
            many = min(chunks, (N - start) // size)
            stop = start + many * size if many else N
            group.append(_Piece(row, min(B, row + rows), start, stop, max(1, many), size if many else stop - start))
            start = stop
        groups.append(group)
    return groups


#: scores of the chunks that are worked on together
_CACHE_ELEMENTS = 1 << 19
_DEVICE_ELEMENTS = 1 << 26


class _Desk:
    """What is done with the buffers of a lease for piece after piece, so that they stay in cache."""

    def __init__(self, room: Scratch) -> None:
        self.room, self.device, self.dtype = room, room.device, room.dtype

    def __call__(self, name: str, *shape: int) -> Tensor:
        return self.room(name, *shape)

    def load(
        self, name: str, x: Tensor, piece: _Piece, H: int, *, size: int, ones: bool = False, pad: float = 0
    ) -> Tensor:
        """A piece of x (B, K, N, D) as (b, H, T, size, D), copied in the accumulator's dtype and padded."""
        K, D = x.shape[1], x.shape[3]
        out = self(name, piece.last_row - piece.first_row, H, piece.chunks, size, D + ones)
        if size > piece.size:
            out[..., piece.size :, :] = pad
        part = _view(x, piece)
        target = out[..., : piece.size, :D]
        if K == H:
            target.copy_(part)
        else:
            target.unflatten(1, (K, H // K)).copy_(part.unsqueeze(2))
        if ones:
            out[..., D] = 1.0
        return out

    def matmul(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        out = self(name, *a.shape[:-1], b.shape[-1])
        torch.bmm(a.flatten(0, -3), b.flatten(0, -3), out=out.flatten(0, -3))
        return out

    def multiply(self, name: str, a: Tensor, b: Tensor | None) -> Tensor:
        return a if b is None else torch.mul(a, b, out=self(name, *a.shape))


def _view(x_BHND: Tensor, piece: _Piece) -> Tensor:
    """(b, H, T, c, D) of the piece."""
    part = x_BHND[piece.first_row : piece.last_row, :, piece.start : piece.stop]
    return part.unflatten(2, (piece.chunks, piece.size))


def _store(x_BKND: Tensor, value: Tensor, piece: _Piece) -> None:
    """Write a piece (b, H, T, >= c, >= D); heads that share a key head are summed."""
    K, D = x_BKND.shape[1], x_BKND.shape[3]
    value = value[..., : piece.size, :D]
    if value.shape[1] != K:
        value = value.unflatten(1, (K, -1)).sum(2)
    _view(x_BKND, piece).copy_(value)


def _add_matmul(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    torch.baddbmm(out.flatten(0, -3), a.flatten(0, -3), b.flatten(0, -3), out=out.flatten(0, -3))
    return out


class _Decays(NamedTuple):
    """Products of the decays inside chunks: (b, H, T, c, D'), where D' is 1 for a factor per head.

    `between`: (b, H, T, c, c) from key to query, 0 above the diagonal; None where per channel, see `_halving`.
    `before`: from the chunk's start to each token, inclusive. `after`: from each token, exclusive, to the chunk's end.
    `whole`: (b, H, T, D', 1) of the chunk. The last three are None where nothing decays.
    """

    between: Tensor | None
    before: Tensor | None
    after: Tensor | None
    whole: Tensor | None


def _constant_decays(factors: Tensor | None, c: int, desk: _Desk, cached: dict[int, _Decays]) -> _Decays:
    """Of None, or of one factor per head (1, H, 1, 1): lambda^(i - j), the same in all chunks of a length."""
    if c in cached:
        return cached[c]
    place = torch.arange(c, dtype=torch.float64, device=desk.device)
    if factors is None:
        lower = torch.ones(c, c, dtype=desk.dtype, device=desk.device).tril()
        cached[c] = _Decays(lower, None, None, None)
    else:
        # log 0 x distance 0 would be NaN; the smallest normal number is as good as 0
        log = factors.double().clamp_min(torch.finfo(desk.dtype).tiny).log().unsqueeze(-1)
        distance = (place[:, None] - place).clamp(min=0)
        powers = (log * distance).exp().tril(), *((log * x).exp() for x in (place[:, None] + 1, c - 1 - place[:, None]))
        between, before, after = (x.to(desk.dtype) for x in powers)
        cached[c] = _Decays(between, before, after, before[..., -1:, :])
    return cached[c]


def _token_decays(factors: Tensor, desk: _Desk) -> _Decays:
    """Of one factor per head and token (b, H, T, c, 1); c is a power of two."""
    between = desk("between", *factors.shape[:-1], factors.shape[-2]).zero_()
    between.diagonal(0, -2, -1).fill_(1.0)
    before, after = desk("before", *factors.shape), desk("after", *factors.shape)
    for s, later_before, earlier_after in _spans_of_products(factors, before, after):
        torch.mul(later_before, earlier_after.transpose(-1, -2), out=_corners(between, s))
    return _Decays(between, before, after, before[..., -1:, :])


def _spans_of_products(factors: Tensor, before: Tensor, after: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Spans of 2s tokens in a chunk of c, for s = 1, 2, 4, ... c / 2: what leads from the earlier to the later half.

    Yields s, the products from the middle to each token of the later half, inclusive, and those from each token of the
    earlier half, exclusive, to the middle: (b, H, T, n, s, D'). In the end `before` and `after` hold the products of
    the whole chunk. Factors only ever multiply.
    """
    before.copy_(factors)
    after.fill_(1.0)
    s = 1
    while s < factors.shape[-2]:
        earlier_before, later_before = _spans(before, s)
        earlier_after, _ = _spans(after, s)
        yield s, later_before, earlier_after
        earlier_after.mul_(later_before[..., -1:, :])
        later_before.mul_(earlier_before[..., -1:, :])
        s *= 2


class _HalvingGrads(NamedTuple):
    """Gradients that a halving passes on: of the scores (given), of q and k (added to), and by level, for decays."""

    scores: Tensor
    q: Tensor
    k: Tensor
    levels: list[tuple[Tensor, Tensor]]


def _halving(q: Tensor, k: Tensor, factors: Tensor, desk: _Desk, grads: _HalvingGrads | None) -> tuple[Tensor, _Decays]:
    """Scores (b, H, T, c, c) and decays of a chunk with one factor per channel (b, H, T, c, D); c is a power of two.

    Spans of 2s tokens are built of two of s: the queries of the later one reach the keys of the earlier one through
    the middle, with the products `before` of the later and `after` of the earlier, both local to their span.
    """
    before, after = desk("before", *factors.shape), desk("after", *factors.shape)
    scores = desk("scores", *q.shape[:-1], q.shape[-2]).zero_()
    scores.diagonal(0, -2, -1).copy_(torch.mul(q, k, out=desk("product", *q.shape)).sum(-1))
    if grads is not None:
        diagonal = grads.scores.diagonal(0, -2, -1).unsqueeze(-1)
        torch.mul(diagonal, k, out=grads.q)
        torch.mul(diagonal, q, out=grads.k)
    for s, later_before, earlier_after in _spans_of_products(factors, before, after):
        later, earlier = _spans(q, s)[1] * later_before, _spans(k, s)[0] * earlier_after
        _corners(scores, s).copy_(_pairs(later, earlier))
        if grads is not None:
            corner = _corners(grads.scores, s).contiguous()
            later_grad, earlier_grad = corner @ earlier, corner.transpose(-1, -2) @ later
            _spans(grads.q, s)[1].addcmul_(later_grad, later_before)
            _spans(grads.k, s)[0].addcmul_(earlier_grad, earlier_after)
            grads.levels.append((later_grad.mul_(later), earlier_grad.mul_(earlier)))
    return scores, _Decays(None, before, after, before[..., -1, :, None])


def _halving_back(before: Tensor, after: Tensor, levels: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Gradient of the logarithms of the decays, from those of the logarithms of `before` and `after` (overwritten)."""
    for later_grad, earlier_grad in reversed(levels):
        s = later_grad.shape[-2]
        earlier_before, later_before = _spans(before, s)
        earlier_after, _ = _spans(after, s)
        earlier_before[..., -1, :] += later_before.sum(-2)
        later_before[..., -1, :] += earlier_after.sum(-2)
        later_before += later_grad
        earlier_after += earlier_grad
    return before


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


def _scan(
    name: str, state: Tensor, new: Tensor, whole: Tensor | None, desk: _Desk, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """State before each chunk (b, H, T, D, E), and after all: state <- whole * state + new, from either end."""
    states = desk(name, *new.shape)
    order = range(new.shape[2])
    for t in reversed(order) if reverse else order:
        states[:, :, t] = state
        if whole is None:
            state = state + new[:, :, t]
        else:
            state = torch.addcmul(new[:, :, t], state, whole[:, :, t if whole.shape[2] > 1 else 0])
    return states, state


def _varies(factors: Tensor) -> bool:
    """By batch row or token, else by head and channel only."""
    return factors.shape[0] != 1 or factors.shape[2] != 1


def _halves(factors: Tensor | None) -> bool:
    """Whether a chunk's decays are built by halving, so that its length must be a power of two."""
    return factors is not None and (_varies(factors) or factors.shape[3] > 1)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    factors: Tensor | None,
    scale: float,
    normalize: bool,
    chunk_size: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, H, N, _), E = q.shape, v.shape[3]
    inverse = state.new_empty(B, H, N if normalize and keep else 0, 1)
    if not keep and N and _in_c(q, factors):
        decay_H = None if factors is None else factors.flatten().double().contiguous()
        out, after = attend_chunks(q, k, v, state, decay_H, scale, normalize)
        return out, inverse, state.new_empty(0, *state.shape), after
    out = large_empty((B, H, N, E), q.dtype, q.device)
    final = state.clone()
    groups = _pieces(B, H, N, chunk_size, factors, q.device.type == "cpu")
    starts = state.new_empty(max(map(len, groups), default=0) if keep else 0, *state.shape)
    with scratch("linear", state.dtype, q.device) as room:
        desk, cached = _Desk(room), dict[int, _Decays]()
        for group in groups:
            for index, piece in enumerate(group):
                rows = slice(piece.first_row, piece.last_row)
                if keep:
                    starts[index, rows] = final[rows]
                size = _power_of_two(piece.size) if _halves(factors) else piece.size
                q_, k_ = (desk.load(name, x, piece, H, size=size) for name, x in (("q", q), ("k", k)))
                v_ = desk.load("v", v, piece, H, size=size, ones=normalize)
                if scale != 1.0:
                    q_ *= scale
                scores, decays = _scores(q_, k_, factors, piece, desk, cached, None)
                new = desk.matmul("new", desk.multiply("k after", k_, decays.after).transpose(-1, -2), v_)
                states, final[rows] = _scan("states", final[rows], new, decays.whole, desk)
                out_ = desk.matmul("out", scores, v_)
                _add_matmul(out_, desk.multiply("q before", q_, decays.before), states)
                if normalize:
                    out_, inverse_ = _divide(out_)
                    if keep:
                        _store(inverse, inverse_, piece)
                _store(out, out_, piece)
    return out, inverse, starts, final


def _scores(
    q: Tensor,
    k: Tensor,
    factors: Tensor | None,
    piece: _Piece,
    desk: _Desk,
    cached: dict[int, _Decays],
    grads: _HalvingGrads | None,
) -> tuple[Tensor, _Decays]:
    """Decayed scores inside the chunks (b, H, T, c, c), 0 above the diagonal, and the decays of q and k beyond them."""
    if factors is not None and _halves(factors):
        loaded = _load_factors(factors, piece, q.shape[-2], desk)
        if factors.shape[3] > 1:
            return _halving(q, k, loaded, desk, grads)
        decays = _token_decays(loaded, desk)
    else:
        decays = _constant_decays(factors, piece.size, desk, cached)
    assert decays.between is not None
    return desk.matmul("scores", q, k.transpose(-1, -2)).mul_(decays.between), decays


def _load_factors(factors: Tensor, piece: _Piece, size: int, desk: _Desk) -> Tensor:
    """(b, H, T, size, D'); the same for every token where the decay does not vary."""
    _, H, _, D = factors.shape
    if not _varies(factors):
        factors = factors.expand(piece.last_row, H, piece.stop, D)
    return desk.load("factors", factors, piece, H, size=size, pad=1.0)


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factors: Tensor | None,
    out: Tensor,
    inverse: Tensor,
    starts: Tensor,
    grad_out: Tensor,
    grad_final: Tensor,
    scale: float,
    normalize: bool,
    chunk_size: int,
    of_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, H, N, _ = q.shape
    grad_q, grad_k, grad_v = (large_empty(x.shape, x.dtype, x.device) for x in (q, k, v))
    grad_state = grad_final.clone()
    grad_factors = _like_factors(factors if of_decay else None, grad_final).zero_()
    channel = factors is not None and factors.shape[3] > 1
    with scratch("linear", grad_final.dtype, q.device) as room:
        desk, cached = _Desk(room), dict[int, _Decays]()
        for group in _pieces(B, H, N, chunk_size, factors, q.device.type == "cpu"):
            for index, piece in reversed(list(enumerate(group))):
                rows = slice(piece.first_row, piece.last_row)
                size = _power_of_two(piece.size) if _halves(factors) else piece.size
                q_, k_ = (desk.load(name, x, piece, H, size=size) for name, x in (("q", q), ("k", k)))
                v_ = desk.load("v", v, piece, H, size=size, ones=normalize)
                grad = desk.load("grad", grad_out, piece, H, size=size, ones=normalize)
                if scale != 1.0:
                    q_ *= scale
                if normalize:
                    # out = numerator / total: d numerator = grad / total, d total = -(grad . out) / total
                    out_ = desk.load("out", out, piece, H, size=size)
                    torch.linalg.vecdot(grad[..., :-1], out_, out=grad[..., -1]).neg_()
                    grad *= desk.load("inverse", inverse, piece, H, size=size)

                grad_scores = desk.matmul("grad scores", grad, v_.transpose(-1, -2))
                grad_q_, grad_k_ = desk("grad q", *q_.shape), desk("grad k", *k_.shape)
                halving = _HalvingGrads(grad_scores, grad_q_, grad_k_, [])
                scores, decays = _scores(q_, k_, factors, piece, desk, cached, halving)
                grad_v_ = desk.matmul("grad v", scores.transpose(-1, -2), grad)
                inside = None
                if not channel:
                    assert decays.between is not None
                    if of_decay:
                        inside = _occurrences(scores.mul_(grad_scores))
                    grad_scores.mul_(decays.between)
                    desk.matmul("grad q", grad_scores, k_)
                    desk.matmul("grad k", grad_scores.transpose(-1, -2), q_)

                q_before = desk.multiply("q before", q_, decays.before)
                k_after = desk.multiply("k after", k_, decays.after)
                new = desk.matmul("new", k_after.transpose(-1, -2), v_)
                states, _ = _scan("states", starts[index, rows], new, decays.whole, desk)
                new = desk.matmul("new", q_before.transpose(-1, -2), grad)
                grad_states, grad_state[rows] = _scan(
                    "grad states", grad_state[rows], new, decays.whole, desk, reverse=True
                )
                _add_matmul(grad_v_, k_after, grad_states)
                grad_q_before = desk.matmul("grad q before", grad, states.transpose(-1, -2))
                grad_k_after = desk.matmul("grad k after", v_, grad_states.transpose(-1, -2))
                if decays.before is None or decays.after is None or decays.whole is None:
                    grad_q_ += grad_q_before
                    grad_k_ += grad_k_after
                else:
                    grad_q_.addcmul_(grad_q_before, decays.before)
                    grad_k_.addcmul_(grad_k_after, decays.after)
                    if of_decay:
                        before, after = grad_q_before.mul_(q_before), grad_k_after.mul_(k_after)
                        whole = states.mul_(grad_states).mul_(decays.whole).sum(-1)
                        if channel:
                            before[..., -1, :] += whole
                            logs = _halving_back(before, after, halving.levels)
                        else:
                            assert inside is not None
                            ones = torch.ones(size, size, dtype=before.dtype, device=q.device)
                            logs = inside + before.sum(-1) @ ones.tril() + after.sum(-1) @ ones.triu(1)
                            logs = (logs + whole.sum(-1, keepdim=True)).unsqueeze(-1)
                        _store_decay(grad_factors, logs, factors, piece, desk)
                if scale != 1.0:
                    grad_q_ *= scale
                for target, value in ((grad_q, grad_q_), (grad_k, grad_k_), (grad_v, grad_v_)):
                    _store(target, value, piece)
    return grad_q, grad_k, grad_v, grad_state, grad_factors


def _like_factors(factors: Tensor | None, other: Tensor) -> Tensor:
    return other.new_empty(0) if factors is None else other.new_empty(factors.shape, dtype=factors.dtype)


def _occurrences(terms: Tensor) -> Tensor:
    """For each token t of a chunk the sum of the terms (i, j) in which its decay occurs: j < t <= i."""
    ones = torch.ones(terms.shape[-1], terms.shape[-1], dtype=terms.dtype, device=terms.device)
    return (terms @ ones.triu(1)).mul_(ones.tril()).sum(-2)


def _store_decay(grad: Tensor, logs: Tensor, factors: Tensor | None, piece: _Piece, desk: _Desk) -> None:
    """From the gradient of the logarithm to that of the factor, which is taken as 0 where the factor is 0."""
    assert factors is not None
    part = _load_factors(factors, piece, logs.shape[-2], desk)
    value = torch.where(part > 0, logs / part, 0.0)[..., : piece.size, :]
    if not _varies(factors):
        grad += value.sum((0, 2, 3))[None, :, None]
    else:
        _view(grad, piece).copy_(value)


# Operators of their own: opaque to torch.compile, which would otherwise unroll the loop over pieces. Defined in the
# dispatcher directly: `torch.library.custom_op` would import the compiler (seconds) at the first call.


def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    factors: Tensor | None,
    scale: float,
    normalize: bool,
    chunk_size: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (B, H, N, _), E = q.shape, v.shape[3]
    groups = _pieces(B, H, N, chunk_size, factors, q.device.type == "cpu") if keep else []
    return (
        q.new_empty(B, H, N, E),
        state.new_empty(B, H, N if normalize and keep else 0, 1),
        state.new_empty(max(map(len, groups), default=0), *state.shape),
        state.new_empty(state.shape),
    )


def _backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    factors: Tensor | None,
    out: Tensor,
    inverse: Tensor,
    starts: Tensor,
    grad_out: Tensor,
    grad_final: Tensor,
    scale: float,
    normalize: bool,
    chunk_size: int,
    of_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, grad_final = (x.new_empty(x.shape) for x in (q, k, v, grad_final))
    return q, k, v, grad_final, _like_factors(factors if of_decay else None, grad_final)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, factors, *ctx.settings, _ = inputs
    out, inverse, starts, _ = output
    ctx.save_for_backward(q, k, v, factors, out, inverse, starts)


def _differentiate(ctx: Any, grad_out: Tensor, _inverse: Any, _starts: Any, grad_final: Tensor) -> tuple[Any, ...]:
    q, k, v, factors, out, inverse, starts = ctx.saved_tensors
    of_decay = ctx.needs_input_grad[4]
    *grads, grad_factors = torch.ops.saccade.linear_chunked_backward(
        q, k, v, factors, out, inverse, starts, grad_out, grad_final, *ctx.settings, of_decay
    )
    return (*grads, grad_factors if of_decay else None, None, None, None, None)


_library = torch.library.Library("saccade", "FRAGMENT")
for _name, _kernel, _shapes in (
    ("linear_chunked", _forward, _forward_shapes),
    ("linear_chunked_backward", _backward, _backward_shapes),
):
    _library.define(_name + torch.library.infer_schema(_kernel, mutates_args=()))
    _library.impl(_name, exact(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"saccade::{_name}", _shapes, lib=_library)
_once = first_derivatives_only("linear_attend", "linear_attend_reference has all")
torch.library.register_autograd("saccade::linear_chunked", _once(_differentiate), setup_context=_remember, lib=_library)
