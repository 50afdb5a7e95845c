"""The operators `saccade::shifted_attend` and its backward.

    S = scale * Q K^T + bias,   P = exp2(S log2 e - lse),   O = P V
    dV = P^T dO,   dS = P * (dO V^T - rowsum(dO * O) + dlse),   dQ = scale * dS K,   dK = scale * dS^T Q
    dbias = sum of dS over windows

Shape letters: B batch, H query heads, K key heads, G = H / K, N tokens, D head dim of q and k, E of v, T tokens of a
window; n windows of a piece, each for every key head that it has.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from saccade.ops.autocast import working_dtype
from saccade.ops.grad import first_derivatives_only
from saccade.ops.partitions.pieces import LOG2_E, Call, loaded, piece_of, store, target, unpacked
from saccade.ops.scratch import scratch

#: sums of exp2(scores) in which neither the weights nor their products with values leave the range of floats
_SAFE_SUMS = (2.0**-90, 2.0**80)


def _empty_out(v: Tensor, H: int) -> Tensor:
    """The output, tokens and heads in memory as in the values."""
    return torch.empty_like(v) if v.shape[1] == H else v.new_empty(v.shape[0], H, *v.shape[2:])


@torch.library.custom_op("saccade::shifted_attend", mutates_args=())
def attend_boxes(
    tensors: list[Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = unpacked(tensors)
    (B, H, N, D), K, E = q.shape, k.shape[1], v.shape[3]
    G, dtype = H // K, working_dtype(q.dtype)
    out = _empty_out(v, H)
    lse = torch.empty(B, H, N, dtype=dtype, device=q.device)
    call = Call(q, bias, mask, spec, scale, memory_mb * 2**20 / 3)
    safe = q.device.type == "cpu"  # elsewhere a look at the sums would wait for the device
    with scratch("shifted", dtype, q.device) as room:
        for boxes in call.kinds:
            T, bias_KGTT = boxes.tokens, call.bias_of(boxes, G)
            q_boxes, k_boxes, v_boxes, out_boxes, lse_boxes = (boxes.view(x) for x in (q, k, v, out, lse[..., None]))
            for cut in call.cuts(boxes, B, K, G):
                n = prod(s.stop - s.start for s in cut)  # windows and key heads of the piece
                k_piece = loaded(room, "k", piece_of(k_boxes, cut), n, T, D)
                q_piece = loaded(room, "q", piece_of(q_boxes, cut, G), n, G * T, D)
                v_piece = loaded(room, "v", piece_of(v_boxes, cut), n, T, E)
                scores = room("scores", n, G * T, T)
                call.score(scores, q_piece, k_piece, bias_KGTT, cut)
                top = None
                if safe:
                    weights = scores.exp2_()
                    sums = weights.sum(-1, keepdim=True)
                    smallest, largest = sums.aminmax()
                    safe = _SAFE_SUMS[0] < smallest.item() and largest.item() < _SAFE_SUMS[1]
                    if not safe:
                        call.score(scores, q_piece, k_piece, bias_KGTT, cut)
                if not safe:
                    top = scores.amax(-1, keepdim=True)
                    top.masked_fill_(top == float("-inf"), 0.0)
                    weights = scores.sub_(top).exp2_()
                    sums = weights.sum(-1, keepdim=True)
                lse_view, out_view = piece_of(lse_boxes, cut, G), piece_of(out_boxes, cut, G)
                logs = sums.log2() if top is None else sums.log2().add_(top)
                torch.mul(logs.view(lse_view.shape), 1 / LOG2_E, out=lse_view)
                if top is not None:
                    sums.masked_fill_(sums == 0, 1.0)
                weighted = torch.bmm(weights, v_piece, out=room("out", n, G * T, E))
                torch.mul(weighted.view(out_view.shape), sums.reciprocal_().view(lse_view.shape), out=out_view)
    return out, lse


@attend_boxes.register_fake
def _(
    tensors: list[Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> Any:
    q, _, v = unpacked(tensors)
    return _empty_out(v, q.shape[1]), q.new_empty(q.shape[:3], dtype=working_dtype(q.dtype))


@torch.library.custom_op("saccade::shifted_attend_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: list[Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> list[Tensor]:
    q, k, v = unpacked(tensors)
    B, H, _, D = q.shape
    K, E = k.shape[1], v.shape[3]
    G, dtype = H // K, working_dtype(q.dtype)
    grads = [torch.empty_like(x) for x in tensors]
    grad_q, grad_k, grad_v = unpacked(grads)
    grad_bias = torch.zeros((0,) if bias is None else bias.shape, dtype=dtype, device=q.device)
    shift = lse.masked_fill(lse == float("-inf"), 0.0).mul_(LOG2_E)[..., None]
    call = Call(q, bias, mask, spec, scale, memory_mb * 2**20 / 6)
    with scratch("shifted", dtype, q.device) as room:
        for boxes in call.kinds:
            T, bias_KGTT = boxes.tokens, call.bias_of(boxes, G)
            q_boxes, go_boxes, out_boxes, shift_boxes, gq_boxes = (
                boxes.view(x) for x in (q, grad_out, out, shift, grad_q)
            )
            k_boxes, v_boxes, gk_boxes, gv_boxes = (boxes.view(x) for x in (k, v, grad_k, grad_v))
            grad_lse_boxes = None if grad_lse is None else boxes.view(grad_lse[..., None])
            for cut in call.cuts(boxes, B, K, G):
                heads, n = cut[-1].stop - cut[-1].start, prod(s.stop - s.start for s in cut)
                k_view, q_view, go_view = piece_of(k_boxes, cut), piece_of(q_boxes, cut, G), piece_of(go_boxes, cut, G)
                k_piece = loaded(room, "k", k_view, n, T, D)
                q_piece = loaded(room, "q", q_view, n, G * T, D)
                v_piece = loaded(room, "v", piece_of(v_boxes, cut), n, T, E)
                go = loaded(room, "grad_out", go_view, n, G * T, E)

                scores = room("scores", n, G * T, T)
                minus = piece_of(shift_boxes, cut, G).reshape(-1, heads, G, T, 1)
                call.score(scores, q_piece, k_piece, bias_KGTT, cut, minus)
                weights = scores.exp2_()

                gv_view = piece_of(gv_boxes, cut)
                gv = target(room, "grad_k", gv_view, n, T, E)
                store(gv_view, torch.bmm(weights.mT, go, out=gv))

                both = room("product", *go_view.shape)
                delta = torch.mul(go.view(go_view.shape), piece_of(out_boxes, cut, G), out=both).sum(-1).neg_()
                if grad_lse_boxes is not None:
                    delta += piece_of(grad_lse_boxes, cut, G)[..., 0]
                grad_scores = room("grad_scores", n, G * T, T)
                grad_scores.copy_(delta.view(n, G * T, 1))
                grad_scores.baddbmm_(go, v_piece.mT).mul_(weights)

                gq_view, gk_view = piece_of(gq_boxes, cut, G), piece_of(gk_boxes, cut)
                gq = target(room, "grad_q", gq_view, n, G * T, D)
                store(gq_view, torch.baddbmm(gq, grad_scores, k_piece, beta=0, alpha=scale, out=gq))
                gk = target(room, "grad_k", gk_view, n, T, D)
                store(gk_view, torch.baddbmm(gk, grad_scores.mT, q_piece, beta=0, alpha=scale, out=gk))
                if bias is not None:
                    total = grad_scores.view(-1, heads * G * T * T).sum(0)
                    part = boxes.pairs(grad_bias)[cut[-1].start * G : cut[-1].stop * G]
                    part += total.view(part.shape)
    return [*grads, grad_bias if bias is None else grad_bias.to(bias.dtype)]


@_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    tensors: list[Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> Any:
    grad_bias = out.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return [*(torch.empty_like(x) for x in tensors), grad_bias]


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    tensors, bias, mask, ctx.spec, ctx.scale, ctx.memory_mb = inputs
    ctx.save_for_backward(*tensors, bias, mask, *output)


def _differentiate(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
    *tensors, bias, mask, out, lse = ctx.saved_tensors
    *grads, grad_bias = _backward(
        grad_out, grad_lse, list(tensors), bias, mask, out, lse, ctx.spec, ctx.scale, ctx.memory_mb
    )
    return grads, None if bias is None else grad_bias, None, None, None, None


_once = first_derivatives_only("window_attend", "saccade.attend with a mask and backend='reference' has all")
attend_boxes.register_autograd(_once(_differentiate), setup_context=_setup)


@register_flop_formula(torch.ops.saccade.shifted_attend)
def _flops(tensors: Any, bias: Any, mask: Any, spec: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Both products of every query with a whole window of keys, as published sizes count them."""
    B, H, N, E = out_shape[0]
    d = len(spec) // 3
    keys = prod(min(n, w) for n, w in zip(spec[:d], spec[d : 2 * d]))
    return int(2 * B * H * N * keys * (tensors[0][-1] + E))
