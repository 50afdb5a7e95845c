"""The operators `saccade::linear_chunked` and its backward: chunk after chunk, a state S between them.

    o = (decayed q k^T inside the chunk) v + (q * decays since its start) S
    S <- (decay of the whole chunk) S + (k * decays to its end)^T v

Backward recomputes each piece from its inputs and from the state before it.

Shape letters: B batch (b rows of a piece), H heads, N tokens, D feature width, E value width (one wider inside where
normalised: a column of ones carries the denominator), T chunks of a piece, c tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.ops import native
from saccade.ops.autocast import exact
from saccade.ops.grad import first_derivatives_only
from saccade.ops.linear.decays import (
    Decays,
    HalvingGrads,
    constant_decays,
    halving_back,
    load_factors,
    occurrences,
    scores_by_halving,
    token_decays,
)
from saccade.ops.linear.pieces import (
    Buffers,
    Piece,
    add_matmul,
    by_halving,
    cut_pieces,
    divide,
    power_of_two,
    store,
    varies,
    view_of,
)
from saccade.ops.memory import large_empty
from saccade.ops.native.linear import attend_chunks
from saccade.ops.scratch import scratch


def _in_c(q: Tensor, factors: Tensor | None) -> bool:
    """Whether the C code does it: single precision, and decays that vary with the head alone."""
    return q.dtype == torch.float32 and not by_halving(factors) and native.refusal(q.device, q.dtype) is None


def _scan(
    name: str, state: Tensor, new: Tensor, whole: Tensor | None, buffers: Buffers, reverse: bool = False
) -> tuple[Tensor, Tensor]:
    """State before each chunk (b, H, T, D, E), and after all: state <- whole * state + new, from either end."""
    states = buffers(name, *new.shape)
    order = range(new.shape[2])
    for t in reversed(order) if reverse else order:
        states[:, :, t] = state
        if whole is None:
            state = state + new[:, :, t]
        else:
            state = torch.addcmul(new[:, :, t], state, whole[:, :, t if whole.shape[2] > 1 else 0])
    return states, state


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
    groups = cut_pieces(B, H, N, chunk_size, factors, q.device.type == "cpu")
    starts = state.new_empty(max(map(len, groups), default=0) if keep else 0, *state.shape)
    with scratch("linear", state.dtype, q.device) as room:
        buffers, cached = Buffers(room), dict[int, Decays]()
        for group in groups:
            for index, piece in enumerate(group):
                rows = slice(piece.first_row, piece.last_row)
                if keep:
                    starts[index, rows] = final[rows]
                size = power_of_two(piece.size) if by_halving(factors) else piece.size
                q_, k_ = (buffers.load(name, x, piece, H, size=size) for name, x in (("q", q), ("k", k)))
                v_ = buffers.load("v", v, piece, H, size=size, ones=normalize)
                if scale != 1.0:
                    q_ *= scale
                scores, decays = _scores(q_, k_, factors, piece, buffers, cached, None)
                new = buffers.matmul("new", buffers.multiply("k after", k_, decays.to_end).transpose(-1, -2), v_)
                states, final[rows] = _scan("states", final[rows], new, decays.whole, buffers)
                out_ = buffers.matmul("out", scores, v_)
                add_matmul(out_, buffers.multiply("q before", q_, decays.from_start), states)
                if normalize:
                    out_, inverse_ = divide(out_)
                    if keep:
                        store(inverse, inverse_, piece)
                store(out, out_, piece)
    return out, inverse, starts, final


def _scores(
    q: Tensor,
    k: Tensor,
    factors: Tensor | None,
    piece: Piece,
    buffers: Buffers,
    cached: dict[int, Decays],
    grads: HalvingGrads | None,
) -> tuple[Tensor, Decays]:
    """Decayed scores inside the chunks (b, H, T, c, c), 0 above the diagonal, and the decays of q and k beyond them."""
    if factors is not None and by_halving(factors):
        loaded = load_factors(factors, piece, q.shape[-2], buffers)
        if factors.shape[3] > 1:
            return scores_by_halving(q, k, loaded, buffers, grads)
        decays = token_decays(loaded, buffers)
    else:
        decays = constant_decays(factors, piece.size, buffers, cached)
    assert decays.between is not None
    return buffers.matmul("scores", q, k.transpose(-1, -2)).mul_(decays.between), decays


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
        buffers, cached = Buffers(room), dict[int, Decays]()
        for group in cut_pieces(B, H, N, chunk_size, factors, q.device.type == "cpu"):
            for index, piece in reversed(list(enumerate(group))):
                rows = slice(piece.first_row, piece.last_row)
                size = power_of_two(piece.size) if by_halving(factors) else piece.size
                q_, k_ = (buffers.load(name, x, piece, H, size=size) for name, x in (("q", q), ("k", k)))
                v_ = buffers.load("v", v, piece, H, size=size, ones=normalize)
                grad = buffers.load("grad", grad_out, piece, H, size=size, ones=normalize)
                if scale != 1.0:
                    q_ *= scale
                if normalize:
                    # out = numerator / total: d numerator = grad / total, d total = -(grad . out) / total
                    out_ = buffers.load("out", out, piece, H, size=size)
                    torch.linalg.vecdot(grad[..., :-1], out_, out=grad[..., -1]).neg_()
                    grad *= buffers.load("inverse", inverse, piece, H, size=size)

                grad_scores = buffers.matmul("grad scores", grad, v_.transpose(-1, -2))
                grad_q_, grad_k_ = buffers("grad q", *q_.shape), buffers("grad k", *k_.shape)
                halving = HalvingGrads(grad_scores, grad_q_, grad_k_, [])
                scores, decays = _scores(q_, k_, factors, piece, buffers, cached, halving)
                grad_v_ = buffers.matmul("grad v", scores.transpose(-1, -2), grad)
                inside = None
                if not channel:
                    assert decays.between is not None
                    if of_decay:
                        inside = occurrences(scores.mul_(grad_scores))
                    grad_scores.mul_(decays.between)
                    buffers.matmul("grad q", grad_scores, k_)
                    buffers.matmul("grad k", grad_scores.transpose(-1, -2), q_)

                q_before = buffers.multiply("q before", q_, decays.from_start)
                k_after = buffers.multiply("k after", k_, decays.to_end)
                new = buffers.matmul("new", k_after.transpose(-1, -2), v_)
                states, _ = _scan("states", starts[index, rows], new, decays.whole, buffers)
                new = buffers.matmul("new", q_before.transpose(-1, -2), grad)
                grad_states, grad_state[rows] = _scan(
                    "grad states", grad_state[rows], new, decays.whole, buffers, reverse=True
                )
                add_matmul(grad_v_, k_after, grad_states)
                grad_q_before = buffers.matmul("grad q before", grad, states.transpose(-1, -2))
                grad_k_after = buffers.matmul("grad k after", v_, grad_states.transpose(-1, -2))
                if decays.from_start is None or decays.to_end is None or decays.whole is None:
                    grad_q_ += grad_q_before
                    grad_k_ += grad_k_after
                else:
                    grad_q_.addcmul_(grad_q_before, decays.from_start)
                    grad_k_.addcmul_(grad_k_after, decays.to_end)
                    if of_decay:
                        from_start, to_end = grad_q_before.mul_(q_before), grad_k_after.mul_(k_after)
                        whole = states.mul_(grad_states).mul_(decays.whole).sum(-1)
                        if channel:
                            from_start[..., -1, :] += whole
                            logs = halving_back(from_start, to_end, halving.levels)
                        else:
                            assert inside is not None
                            ones = torch.ones(size, size, dtype=from_start.dtype, device=q.device)
                            logs = inside + from_start.sum(-1) @ ones.tril() + to_end.sum(-1) @ ones.triu(1)
                            logs = (logs + whole.sum(-1, keepdim=True)).unsqueeze(-1)
                        _store_decay(grad_factors, logs, factors, piece, buffers)
                if scale != 1.0:
                    grad_q_ *= scale
                for target, value in ((grad_q, grad_q_), (grad_k, grad_k_), (grad_v, grad_v_)):
                    store(target, value, piece)
    return grad_q, grad_k, grad_v, grad_state, grad_factors


def _like_factors(factors: Tensor | None, other: Tensor) -> Tensor:
    return other.new_empty(0) if factors is None else other.new_empty(factors.shape, dtype=factors.dtype)


def _store_decay(grad: Tensor, logs: Tensor, factors: Tensor | None, piece: Piece, buffers: Buffers) -> None:
    """From the gradient of the logarithm to that of the factor, which is taken as 0 where the factor is 0."""
    assert factors is not None
    part = load_factors(factors, piece, logs.shape[-2], buffers)
    value = torch.where(part > 0, logs / part, 0.0)[..., : piece.size, :]
    if not varies(factors):
        grad += value.sum((0, 2, 3))[None, :, None]
    else:
        view_of(grad, piece).copy_(value)


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
    groups = cut_pieces(B, H, N, chunk_size, factors, q.device.type == "cpu") if keep else []
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
