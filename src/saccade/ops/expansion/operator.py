"""The operators `saccade::expanded` and its backward.

    inside a chunk      o = tril(kappa(q, k)) v       from the kernel itself, which costs D and not F a pair
    from the past       o = o + a(q) S,  S = sum_j b(k_j)^T v_j  (F x E)

Shape letters: R rows (batch x heads), N queries, M keys, D channels, E value width, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from saccade.ops.autocast import exact
from saccade.ops.expansion.kernels import Expansion, kernel_of
from saccade.ops.grad import first_derivatives_only
from saccade.ops.scratch import Scratch, scratch

#: features that are worked on together
_CPU_ELEMENTS = 1 << 22
_DEVICE_ELEMENTS = 1 << 27


def _groups(rows: int, features: int, size: int, like: Tensor) -> Iterator[slice]:
    """Rows whose chunks are worked on together."""
    most = _CPU_ELEMENTS if like.device.type == "cpu" else _DEVICE_ELEMENTS
    step = max(1, most // max(1, features * size))
    return (slice(start, min(rows, start + step)) for start in range(0, rows, step))


def cut_tokens(tokens: int, size: int) -> list[slice]:
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
    expansion, dtype = kernel_of(code), state.dtype
    F = expansion.width(D)
    out, after = state.new_empty(R, N, E), state.clone()
    with scratch("expansion", dtype, state.device) as buffers:
        if not causal:
            pairwise = _pairwise(N, M, D, E, F)
            starts = state.new_zeros(R, 0 if pairwise else F, E)
            for rows in _groups(R, F, chunk_size, q):
                if pairwise:
                    k_, v_ = k[rows].to(dtype), v[rows].to(dtype)
                    for at in cut_tokens(N, _tile(M, F, chunk_size)):
                        torch.bmm(expansion.scores(q[rows, at].to(dtype), k_), v_, out=out[rows, at])
                else:
                    total = starts[rows]
                    for at in cut_tokens(M, chunk_size):
                        _accumulate(total, expansion.features(k[rows, at].to(dtype), False, buffers), v[rows, at])
                    for at in cut_tokens(N, chunk_size):
                        torch.bmm(expansion.features(q[rows, at].to(dtype), True, buffers), total, out=out[rows, at])
            return out, after, starts
        chunks, stride = cut_tokens(N, chunk_size), _stride(F, chunk_size)
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
    expansion, dtype = kernel_of(code), grad_after.dtype
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
                for at in cut_tokens(N, _tile(M, F, chunk_size)):
                    dq, dk, dv = _pairs_back(expansion, q[rows, at].to(dtype), k_, v_, grad_out[rows, at], causal=False)
                    grad_q[rows, at] = dq
                    all_dk += dk
                    all_dv += dv
                grad_k[rows], grad_v[rows] = all_dk, all_dv
            else:
                total, total_grad = starts[rows], torch.zeros_like(starts[rows])
                for at in cut_tokens(N, chunk_size):
                    q_, grad = q[rows, at].to(dtype), grad_out[rows, at]
                    back = torch.bmm(grad, total.transpose(1, 2), out=buffers("back", *grad.shape[:2], F))
                    grad_q[rows, at] = expansion.features_back(q_, back, True)
                    _accumulate(total_grad, expansion.features(q_, True, buffers), grad)
                for at in cut_tokens(M, chunk_size):
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
    chunks, stride = cut_tokens(k.shape[1], chunk_size), _stride(F, chunk_size)
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
    F = kernel_of(code).width(D)
    if causal:
        kept = -(-len(cut_tokens(N, chunk_size)) // _stride(F, chunk_size)) if keep else 0
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
