"""Linear attention with wide features: built for one chunk of tokens at a time, and inside a chunk not at all.

    o_i = sum_{j<=i} kappa(q_i, k_j) v_j,     kappa(q, k) = a(q) . b(k),     a, b: D channels -> F features, F >> D

`linear_attend` takes features as they are, N x F numbers. Where F is hundreds or thousands (products of channels) that
is more than everything else together, so here an `Expansion` makes them on demand:

    inside a chunk      o = tril(kappa(q, k)) v       from the kernel itself, which costs D and not F a pair
    from the past       o = o + a(q) S,  S = sum_j b(k_j)^T v_j  (F x E)

Nothing of size N x F or N x N exists, forward or backward: each chunk is computed again for its gradient, from its
tokens and from the state before it. That state is kept for every F tokens or so, and computed again in between. Without
causality few keys are met pair by pair, a tile of queries at a time, wherever that costs less than features.

There is no normaliser: carry a column of ones in v, or of zeros and ones where some keys are padding.

Shape letters: B batch, H heads, R rows (batch x heads), N queries, M keys, D channels, E value width, F features,
c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from saccade.ops.autocast import exact
from saccade.ops.export import exporting
from saccade.ops.grad import first_derivatives_only, needs_grad
from saccade.ops.memory import large_empty
from saccade.ops.scratch import Scratch, scratch

__all__ = ["Expansion", "Outer", "Polynomial", "expanded_attend", "expanded_attend_reference", "in_segments"]


class Expansion(Protocol):
    """A kernel, its features, and the gradients of both. Tensors (R, c, D), (R, c, F), (R, n, m)."""

    @property
    def code(self) -> list[float]:
        """The arguments from which `_expansion` makes an equal one."""

    def width(self, channels: int) -> int:
        """F."""

    def features(self, x: Tensor, query: bool, buffers: Scratch) -> Tensor:
        """a(x) or b(x)."""

    def features_back(self, x: Tensor, grad: Tensor, query: bool) -> Tensor:
        """Gradient of x from that of its features."""

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """kappa(q, k) of all pairs."""

    def scores_back(self, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of q and k from that of the scores."""


class Polynomial:
    """kappa = a0 + a1 x + a2 x^2 with x = q . k, exactly, in D (D + 1) / 2 + D + 1 features (D + 1 where a2 is 0).

    x^2 = sum_o w_o sum_i (q_i q_{i+o}) (k_i k_{i+o}), indices modulo D: offset o = 0 gives the squares, each o < D / 2
    gives D of the products of two channels, and o = D / 2 the last D / 2 of them; w is 1, then 2. So each pair occurs
    once, and all products are one multiplication of x with windows of itself. The queries carry the coefficients.
    """

    def __init__(self, a0: float = 1.0, a1: float = 1.0, a2: float = 0.5) -> None:
        self.a0, self.a1, self.a2 = a0, a1, a2

    @property
    def code(self) -> list[float]:
        return [0.0, self.a0, self.a1, self.a2]

    def width(self, channels: int) -> int:
        return (channels * (channels + 1) // 2 if self.a2 else 0) + channels + 1

    def features(self, x: Tensor, query: bool, buffers: Scratch) -> Tensor:
        R, c, D = x.shape
        F = self.width(D)
        pairs, offsets = (F - D - 1, D // 2 + 1) if self.a2 else (0, 0)
        out = buffers("features", R, c, F)
        if pairs:
            windows = torch.cat([x, x], -1).unfold(-1, D, 1)[:, :, :offsets]
            products = out[..., : offsets * D].unflatten(-1, (offsets, D))
            torch.mul(windows, (2.0 * self.a2 * x if query else x).unsqueeze(-2), out=products)
            if query:
                products[..., 0, :] *= 0.5
        # what the last offset has too many is written over
        out[..., pairs : pairs + D] = self.a1 * x if query else x
        out[..., F - 1] = self.a0 if query else 1.0
        return out

    def features_back(self, x: Tensor, grad: Tensor, query: bool) -> Tensor:
        D = x.shape[-1]
        pairs = grad.shape[-1] - D - 1
        linear = grad[..., pairs : pairs + D]
        out = self.a1 * linear if query else linear.clone()
        if pairs:
            twice, rolled = torch.cat([x, x], -1), torch.zeros_like(torch.cat([x, x], -1))
            straight = torch.zeros_like(x)
            for offset in range(D // 2 + 1):
                part = grad[..., offset * D : min(pairs, (offset + 1) * D)]
                wide = part.shape[-1]
                straight[..., :wide].addcmul_(part, twice[..., offset : offset + wide])
                rolled[..., offset : offset + wide].addcmul_(part, x[..., :wide])
                if offset == 0 and query:  # the squares weigh half of the others
                    straight *= 0.5
                    rolled *= 0.5
            straight += rolled[..., :D] + rolled[..., D:]
            out.add_(straight, alpha=2.0 * self.a2 if query else 1.0)
        return out

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        x = q @ k.transpose(-1, -2)
        return (self.a2 * x).add_(self.a1).mul_(x).add_(self.a0) if self.a2 else x.mul_(self.a1).add_(self.a0)

    def scores_back(self, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        if self.a2:
            grad = (q @ k.transpose(-1, -2)).mul_(2.0 * self.a2).add_(self.a1).mul_(grad)
        else:
            grad = self.a1 * grad
        return grad @ k, grad.transpose(-1, -2) @ q


class Outer:
    """kappa = (q' . k') (q'' . k''), where x' are the first `first` channels of x and x'' the others."""

    def __init__(self, first: int) -> None:
        self.first = int(first)

    @property
    def code(self) -> list[float]:
        return [1.0, float(self.first)]

    def width(self, channels: int) -> int:
        return self.first * (channels - self.first)

    def features(self, x: Tensor, query: bool, buffers: Scratch) -> Tensor:
        left, right = self._parts(x)
        out = buffers("features", *left.shape, right.shape[-1])
        return torch.mul(left.unsqueeze(-1), right.unsqueeze(-2), out=out).flatten(-2)

    def features_back(self, x: Tensor, grad: Tensor, query: bool) -> Tensor:
        left, right = self._parts(x)
        grad = grad.unflatten(-1, (self.first, -1))
        grads = (grad @ right.unsqueeze(-1)).squeeze(-1), (left.unsqueeze(-2) @ grad).squeeze(-2)
        return torch.cat(grads, -1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        left, right = self._products(q, k)
        return left.mul_(right)

    def scores_back(self, q: Tensor, k: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self._products(q, k)
        right.mul_(grad), left.mul_(grad)
        (q_left, q_right), (k_left, k_right) = self._parts(q), self._parts(k)
        grad_q = torch.cat([right @ k_left, left @ k_right], -1)
        return grad_q, torch.cat([right.transpose(-1, -2) @ q_left, left.transpose(-1, -2) @ q_right], -1)

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.first], x[..., self.first :]

    def _products(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        (q_left, q_right), (k_left, k_right) = self._parts(q), self._parts(k)
        return q_left @ k_left.transpose(-1, -2), q_right @ k_right.transpose(-1, -2)


def _expansion(code: list[float]) -> Expansion:
    kind, *arguments = code
    return Polynomial(*arguments) if kind == 0.0 else Outer(int(arguments[0]))


def expanded_attend(
    q_BHND: Tensor,
    k_BHMD: Tensor,
    v_BHME: Tensor,
    expansion: Expansion,
    *,
    causal: bool = True,
    state: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
) -> Any:
    """o_i = sum_j kappa(q_i, k_j) v_j over j <= i, or over all j; see the top of this file.

    Args:
        expansion: `Polynomial` or `Outer`.
        state: S of earlier tokens (B, H, F, E), causal only; return_state: also return it after the last token.
        chunk_size: tokens of a chunk; the result does not depend on it. None: 128.

    Returns:
        out (B, H, N, E) in float32 (float64 for float64 inputs), a sum that is still to be normalised; or (out, state).

    Raises:
        ValueError: if the shapes do not fit together, or a state is used where not causal.
    """
    (B, H, N, D), (M, E) = q_BHND.shape, v_BHME.shape[2:]
    if k_BHMD.shape != (B, H, M, D) or v_BHME.shape[:2] != (B, H):
        got = ", ".join(str(tuple(x.shape)) for x in (q_BHND, k_BHMD, v_BHME))
        raise ValueError(f"query, key and value must be (B, H, N, D), (B, H, M, D) and (B, H, M, E), got {got}")
    if causal and N != M:
        raise ValueError(f"causal linear attention needs as many keys as queries, got {N} and {M}")
    if not causal and (state is not None or return_state):
        raise ValueError("a state needs causal=True")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    F = expansion.width(D)
    wide = torch.float64 if q_BHND.dtype == torch.float64 else torch.float32
    if state is None:
        before = q_BHND.new_zeros(B * H, F if causal else 0, E, dtype=wide)
    elif state.shape != (B, H, F, E):
        raise ValueError(f"state must be (B, H, F, E) = {(B, H, F, E)}, got {tuple(state.shape)}")
    else:
        before = state.to(wide).flatten(0, 1)
    inputs = (*(x.flatten(0, 1) for x in (q_BHND, k_BHMD, v_BHME)), before)
    keep = needs_grad(*inputs)
    chunk_size = chunk_size or 128
    settings = expansion.code, causal, chunk_size, state is None, return_state
    if exporting() and state is None and not return_state:
        q_BHND, k_BHMD, v_BHME = (x.to(wide) for x in (q_BHND, k_BHMD, v_BHME))
        return expanded_attend_reference(q_BHND, k_BHMD, v_BHME, expansion, causal=causal)
    out, after, _ = torch.ops.saccade.expanded(*inputs, *settings, keep)
    out = out.unflatten(0, (B, H))
    return (out, after.unflatten(0, (B, H))) if return_state else out


def in_segments(
    attend: Callable[..., tuple[Tensor, Tensor | None]],
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    mask_BN: Tensor | None,
    state: Tensor | None,
    return_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """A causal attend(q, k, v, mask, state, return_state) -> (out, state), a few thousand tokens at a time.

    For inference: what is computed around the sums (norms, projections on random directions, columns of ones) would
    else be fresh memory in proportion to the length, which costs more than its arithmetic.
    """
    (B, H, N, D), E = q_BHND.shape, v_BKNE.shape[3]
    size = max(512, _SEGMENT_ELEMENTS // max(1, B * H * D))
    if size >= N or needs_grad(q_BHND, k_BKND, v_BKNE, state) or torch.compiler.is_compiling():
        return attend(q_BHND, k_BKND, v_BKNE, mask_BN, state, return_state)
    out = large_empty((B, H, N, E), q_BHND.dtype, q_BHND.device)
    for at in _chunks(N, size):
        mask = None if mask_BN is None else mask_BN[:, at]
        parts = (x[:, :, at] for x in (q_BHND, k_BKND, v_BKNE))
        out[:, :, at], state = attend(*parts, mask, state, return_state or at.stop < N)
    return out, state


#: elements of the queries of a segment
_SEGMENT_ELEMENTS = 1 << 19


def expanded_attend_reference(
    q_BHND: Tensor, k_BHMD: Tensor, v_BHME: Tensor, expansion: Expansion, *, causal: bool = True
) -> Tensor:
    """`expanded_attend` from the N x M matrix of scores. The oracle of the tests."""
    scores = expansion.scores(q_BHND, k_BHMD)
    return (scores.tril() if causal else scores) @ v_BHME


#: features that are worked on together
_CPU_ELEMENTS = 1 << 22
_DEVICE_ELEMENTS = 1 << 27


def _groups(rows: int, features: int, size: int, like: Tensor) -> Iterator[slice]:
    """Rows whose chunks are worked on together."""
    most = _CPU_ELEMENTS if like.device.type == "cpu" else _DEVICE_ELEMENTS
    step = max(1, most // max(1, features * size))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def _chunks(tokens: int, size: int) -> list[slice]:
    return [slice(start, min(tokens, start + size)) for start in range(0, tokens, size)]


def _stride(features: int, size: int) -> int:
    """Chunks between two states that are kept for the backward pass."""
    return max(1, features // size)


def _pairwise(N: int, M: int, D: int, E: int, F: int) -> bool:
    """Whether all pairs cost fewer multiplications than the features, where not causal."""
    return N * M * (D + E) <= (N + M) * F * E


def _tile(M: int, features: int, size: int) -> int:
    """Queries that meet all M keys together: as many scores as a chunk has features, or as pairs."""
    return max(1, max(size * size, features * size) // max(1, M))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    code: list[float],
    causal: bool,
    chunk_size: int,
    fresh: bool,
    open_end: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (R, N, D), (M, E) = q.shape, v.shape[1:]
    expansion, dtype = _expansion(code), state.dtype
    F = expansion.width(D)
    out, after = state.new_empty(R, N, E), state.clone()
    with scratch("expansion", dtype, state.device) as buffers:
        if not causal:
            pairwise = _pairwise(N, M, D, E, F)
            starts = state.new_zeros(R, 0 if pairwise else F, E)
            for rows in _groups(R, F, chunk_size, q):
                if pairwise:
                    k_, v_ = k[rows].to(dtype), v[rows].to(dtype)
                    for at in _chunks(N, _tile(M, F, chunk_size)):
                        torch.bmm(expansion.scores(q[rows, at].to(dtype), k_), v_, out=out[rows, at])
                else:
                    total = starts[rows]
                    for at in _chunks(M, chunk_size):
                        _accumulate(total, expansion.features(k[rows, at].to(dtype), False, buffers), v[rows, at])
                    for at in _chunks(N, chunk_size):
                        torch.bmm(expansion.features(q[rows, at].to(dtype), True, buffers), total, out=out[rows, at])
            return out, after, starts
        chunks, stride = _chunks(N, chunk_size), _stride(F, chunk_size)
        starts = state.new_empty(R, -(-len(chunks) // stride) if keep else 0, F, E)
        for rows in _groups(R, F, chunk_size, q):
            total = after[rows]
            for index, at in enumerate(chunks):
                q_, k_, v_ = (x[rows, at].to(dtype) for x in (q, k, v))
                if keep and index % stride == 0:
                    starts[rows, index // stride] = total
                inside = expansion.scores(q_, k_).tril_() @ v_
                if index or not fresh:
                    inside.baddbmm_(expansion.features(q_, True, buffers), total)
                out[rows, at] = inside
                if open_end or index + 1 < len(chunks):
                    _accumulate(total, expansion.features(k_, False, buffers), v_)
        return out, after, starts


def _accumulate(total: Tensor, features: Tensor, v: Tensor) -> None:
    """S += b(k)^T v, in place."""
    total.baddbmm_(features.transpose(-1, -2), v.to(total.dtype))


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    grad_out: Tensor,
    grad_after: Tensor,
    code: list[float],
    causal: bool,
    chunk_size: int,
    fresh: bool,
    open_end: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (R, N, D), M = q.shape, v.shape[1]
    expansion, dtype = _expansion(code), grad_after.dtype
    F = expansion.width(D)
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    grad_state = grad_after.clone()
    with scratch("expansion", dtype, q.device) as buffers:
        for rows in _groups(R, F, chunk_size, q):
            if causal:
                total_grad = grad_state[rows]
                for states, at in _reversed_states(expansion, k[rows], v[rows], starts[rows], chunk_size, buffers):
                    q_, k_, v_ = (x[rows, at].to(dtype) for x in (q, k, v))
                    grad = grad_out[rows, at]
                    dq, dk, dv = _pairs_back(expansion, q_, k_, v_, grad, causal=True)
                    if open_end or at.stop < N:
                        back = torch.bmm(v_, total_grad.transpose(1, 2), out=buffers("back", *v_.shape[:2], F))
                        dk += expansion.features_back(k_, back, False)
                        dv.baddbmm_(expansion.features(k_, False, buffers), total_grad)
                    if at.start or not fresh:
                        back = torch.bmm(grad, states.transpose(1, 2), out=buffers("back", *v_.shape[:2], F))
                        dq += expansion.features_back(q_, back, True)
                        _accumulate(total_grad, expansion.features(q_, True, buffers), grad)
                    grad_q[rows, at], grad_k[rows, at], grad_v[rows, at] = dq, dk, dv
            elif starts.shape[1] == 0:
                k_, v_ = k[rows].to(dtype), v[rows].to(dtype)
                all_dk, all_dv = torch.zeros_like(k_), torch.zeros_like(v_)
                for at in _chunks(N, _tile(M, F, chunk_size)):
                    dq, dk, dv = _pairs_back(expansion, q[rows, at].to(dtype), k_, v_, grad_out[rows, at], causal=False)
                    grad_q[rows, at] = dq
                    all_dk += dk
                    all_dv += dv
                grad_k[rows], grad_v[rows] = all_dk, all_dv
            else:
                total, total_grad = starts[rows], torch.zeros_like(starts[rows])
                for at in _chunks(N, chunk_size):
                    q_, grad = q[rows, at].to(dtype), grad_out[rows, at]
                    back = torch.bmm(grad, total.transpose(1, 2), out=buffers("back", *grad.shape[:2], F))
                    grad_q[rows, at] = expansion.features_back(q_, back, True)
                    _accumulate(total_grad, expansion.features(q_, True, buffers), grad)
                for at in _chunks(M, chunk_size):
                    k_, v_ = k[rows, at].to(dtype), v[rows, at].to(dtype)
                    back = torch.bmm(v_, total_grad.transpose(1, 2), out=buffers("back", *v_.shape[:2], F))
                    grad_k[rows, at] = expansion.features_back(k_, back, False)
                    grad_v[rows, at] = expansion.features(k_, False, buffers) @ total_grad
    return grad_q, grad_k, grad_v, grad_state


def _reversed_states(
    expansion: Expansion, k: Tensor, v: Tensor, starts: Tensor, chunk_size: int, buffers: Scratch
) -> Iterator[tuple[Tensor, slice]]:
    """Chunks from the last to the first, each with the state before it, recomputed from the one kept."""
    R, kept, F, E = starts.shape
    chunks, stride = _chunks(k.shape[1], chunk_size), _stride(F, chunk_size)
    for segment in reversed(range(kept)):
        part = chunks[segment * stride : (segment + 1) * stride]
        states = buffers("states", len(part), R, F, E)
        states[0] = starts[:, segment]
        for index, at in enumerate(part[:-1]):
            features = expansion.features(k[:, at].to(starts.dtype), False, buffers)
            torch.baddbmm(states[index], features.transpose(1, 2), v[:, at].to(starts.dtype), out=states[index + 1])
        for index in reversed(range(len(part))):
            yield states[index], part[index]


def _pairs_back(
    expansion: Expansion, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scores, grad_scores = expansion.scores(q, k), grad @ v.transpose(-1, -2)
    if causal:
        scores.tril_(), grad_scores.tril_()
    dq, dk = expansion.scores_back(q, k, grad_scores)
    return dq, dk, scores.transpose(-1, -2) @ grad


# Operators of their own, as in `linear`: opaque to torch.compile, which would unroll the loop over chunks.


def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    code: list[float],
    causal: bool,
    chunk_size: int,
    fresh: bool,
    open_end: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (R, N, D), (M, E) = q.shape, v.shape[1:]
    F = _expansion(code).width(D)
    if causal:
        kept = -(-len(_chunks(N, chunk_size)) // _stride(F, chunk_size)) if keep else 0
        starts = state.new_empty(R, kept, F, E)
    else:
        starts = state.new_empty(R, 0 if _pairwise(N, M, D, E, F) else F, E)
    return state.new_empty(R, N, E), state.new_empty(state.shape), starts


def _backward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    grad_out: Tensor,
    grad_after: Tensor,
    code: list[float],
    causal: bool,
    chunk_size: int,
    fresh: bool,
    open_end: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(grad_after)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, *ctx.settings, _ = inputs
    ctx.save_for_backward(q, k, v, output[2])


def _differentiate(ctx: Any, grad_out: Tensor, grad_after: Tensor, _: Any) -> tuple[Any, ...]:
    grads = torch.ops.saccade.expanded_backward(*ctx.saved_tensors, grad_out, grad_after, *ctx.settings)
    return (*grads, None, None, None, None, None, None)


_library = torch.library.Library("saccade", "FRAGMENT")
for _name, _kernel, _shapes in (
    ("expanded", _forward, _forward_shapes),
    ("expanded_backward", _backward, _backward_shapes),
):
    _library.define(_name + torch.library.infer_schema(_kernel, mutates_args=()))
    _library.impl(_name, exact(_kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"saccade::{_name}", _shapes, lib=_library)
_once = first_derivatives_only("expanded_attend", "expanded_attend_reference has all")
torch.library.register_autograd("saccade::expanded", _once(_differentiate), setup_context=_remember, lib=_library)
