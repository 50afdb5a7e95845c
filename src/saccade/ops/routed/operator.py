"""The operators `saccade::routed_attend` and its backward: in C or Triton where there is some, else tile by tile.

The parts of a query are merged by their LSEs. The backward pass gives every part the *merged* output and LSE, which
makes the parts' own gradients exact.

Shape letters: B batch, H query heads, K key heads (K divides H), N queries, M keys, D head dim, S tokens per block, n
key blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import native
from saccade.ops.autocast import working_dtype
from saccade.ops.grad import first_derivatives_only
from saccade.ops.heads import repeat_heads
from saccade.ops.native.routes import attend_routes, route_gradients
from saccade.ops.routed.routes import ranges_of_queries, routes_of
from saccade.ops.routed.tiles import attend_own, tiles_backward, tiles_forward
from saccade.ops.scratch import Scratch, scratch
from saccade.ops.triton.routed import attend_routes_in_triton, route_gradients_in_triton, runs_in_triton

#: bytes of partial outputs that are merged at once
_MERGED = 2**21


@torch.library.custom_op(
    "saccade::routed_attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor chosen, int size, float scale, bool own) -> (Tensor, Tensor)",
)
def attend_chosen(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int, scale: float, own: bool) -> Any:
    B, H, N, D = q.shape
    if native.refusal(q.device, q.dtype) is None:
        return attend_routes(q, k, v, chosen, size, scale, own)
    if runs_in_triton(q):
        return attend_routes_in_triton(q, k, v, chosen, size, scale, own)
    rows, k_blocks, v_blocks = q.reshape(B * H * N, D), _blocks(k, size), _blocks(v, size)
    wide = working_dtype(q.dtype)
    if own:
        out, lse = attend_own(rows.view(-1, size, D), *_own_blocks(q, k, v, size), scale)
        out, lse = out.reshape(B * H, N, D).to(wide), lse.reshape(B * H, N)
    else:
        out, lse = (
            rows.new_zeros(B * H, N, D, dtype=wide),
            rows.new_full((B * H, N), float("-inf"), dtype=wide),
        )

    with scratch("routed", q.dtype, q.device) as room:
        for first, last in ranges_of_queries(chosen, D, q.dtype.itemsize):
            routes = routes_of(chosen[:, :, first:last], k.shape[1], k.shape[2] // size, first, N)
            part_out = rows.new_empty(routes.slots + 1, D)
            part_lse = lse.new_empty(routes.slots + 1)
            # the slot past the end is what "no block" reads
            part_out[-1], part_lse[-1] = 0.0, float("-inf")
            for tiles, slots in routes.pieces(size, D, q.dtype.itemsize):
                blocks, picked = routes.blocks[tiles], routes.rows[slots]
                q_tiles, k_tiles, v_tiles = _gather(room, (rows, picked), (k_blocks, blocks), (v_blocks, blocks))
                q_tiles = q_tiles.view(-1, routes.tile, D)
                tile_out, tile_lse = tiles_forward(q_tiles, k_tiles, v_tiles, scale, causal=False)
                part_out[slots] = tile_out.view(-1, D)
                part_lse[slots] = tile_lse.view(-1)

            lse_here = lse[:, first:last]
            merged, weights = _merge_weights(lse_here, part_lse[routes.slot_of])
            lse_here.copy_(merged)
            step = max(1, _MERGED // (B * H * D * q.dtype.itemsize))
            for low in range(0, last - first, step):
                here = slice(low, min(low + step, last - first))
                out_here = out[:, first + here.start : first + here.stop]
                out_here *= weights[:, here, :1]
                for choice in range(chosen.shape[3]):
                    slots_here = routes.slot_of[:, here, choice].flatten()
                    (part,) = _gather(room, (part_out, slots_here))
                    out_here.addcmul_(part.view(out_here.shape).to(wide), weights[:, here, choice + 1, None])
    return out.view(B, H, N, D).to(q.dtype), lse.view(B, H, N)


@attend_chosen.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int, scale: float, own: bool) -> Any:
    wide = working_dtype(q.dtype)
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.custom_op(
    "saccade::routed_attend_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor chosen, Tensor out, Tensor lse, "
    "int size, float scale, bool own) -> (Tensor, Tensor, Tensor)",
)
def _routed_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    out: Tensor,
    lse: Tensor,
    size: int,
    scale: float,
    own: bool,
) -> Any:
    width, dtype = q.shape[3], q.dtype
    if native.refusal(q.device, dtype) is None:
        grads = route_gradients(
            q.float(), k.float(), v.float(), chosen, size, scale, own, out.float(), lse, grad.float(), grad_lse
        )
        return tuple(x.to(dtype).contiguous() for x in grads)
    if runs_in_triton(q):
        return route_gradients_in_triton(q, k, v, chosen, size, scale, own, out, lse, grad, grad_lse)
    if grad_lse is not None:
        # d s = P (dP - rowsum(dO O) + dLSE): a column of 0 in v, 1 in out and -dLSE in d out brings dLSE in
        q, k, v = F.pad(q, (0, 1)), F.pad(k, (0, 1)), F.pad(v, (0, 1))
        out = torch.cat([out, torch.ones_like(out[..., :1])], -1)
        grad = torch.cat([grad, -grad_lse[..., None].to(grad.dtype)], -1)
    B, H, N, D = q.shape
    K, n = k.shape[1], k.shape[2] // size
    q_rows, k_blocks, v_blocks = q.reshape(-1, D), _blocks(k, size), _blocks(v, size)
    out_rows, grad_rows, lse_rows = out.reshape(-1, D), grad.reshape(-1, D), lse.reshape(-1)
    wide = working_dtype(dtype)
    if own:
        grad_own, q_own, out_own = (x.view(-1, size, D) for x in (grad_rows, q_rows, out_rows))
        dq, dk, dv = tiles_backward(
            grad_own,
            q_own,
            *_own_blocks(q, k, v, size),
            out_own,
            lse_rows.view(-1, size),
            scale,
            causal=True,
        )
        dq = dq.reshape(B * H, N, D).to(wide)
        dk, dv = (_own_gradients(x, B, K, n, N // size, wide) for x in (dk, dv))
    else:
        dq = q.new_zeros(B * H, N, D, dtype=wide)
        dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k_blocks, v_blocks))

    for first, last in ranges_of_queries(chosen, D, q.dtype.itemsize):
        routes = routes_of(chosen[:, :, first:last], K, n, first, N)
        part_dq = q.new_empty(routes.slots + 1, D)
        part_dq[-1] = 0.0
        for tiles, slots in routes.pieces(size, 2 * D, q.dtype.itemsize):
            blocks, picked = routes.blocks[tiles], routes.rows[slots]
            spare = routes.spare[slots, None]
            grad_tiles, q_tiles, out_tiles = (
                x.index_select(0, picked).masked_fill_(spare, 0.0).view(-1, routes.tile, D)
                for x in (grad_rows, q_rows, out_rows)
            )
            lse_tiles = lse_rows[picked].masked_fill_(spare[:, 0], 0.0).view(-1, routes.tile)
            dq_tiles, dk_tiles, dv_tiles = tiles_backward(
                grad_tiles,
                q_tiles,
                k_blocks.index_select(0, blocks),
                v_blocks.index_select(0, blocks),
                out_tiles,
                lse_tiles,
                scale,
                causal=False,
            )
            part_dq[slots] = dq_tiles.reshape(-1, D)
            dk.index_add_(0, blocks, dk_tiles.to(wide))
            dv.index_add_(0, blocks, dv_tiles.to(wide))
        dq_here = dq[:, first:last]
        for choice in range(chosen.shape[3]):
            dq_here += part_dq.index_select(0, routes.slot_of[..., choice].flatten()).view(dq_here.shape)

    grads = dq.view(B, H, N, D), dk.view(B, K, n * size, D), dv.view(B, K, n * size, D)
    return tuple(x[..., :width].to(dtype).contiguous() for x in grads)


@_routed_backward.register_fake
def _(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chosen: Tensor,
    out: Tensor,
    lse: Tensor,
    size: int,
    scale: float,
    own: bool,
) -> Any:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, chosen, ctx.size, ctx.scale, ctx.own = inputs
    ctx.save_for_backward(q, k, v, chosen, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
    q, k, v, chosen, out, lse = ctx.saved_tensors
    if grad is None and grad_lse is None:
        return (None,) * 7
    grad = torch.zeros_like(out) if grad is None else grad
    grads = _routed_backward(grad, grad_lse, q, k, v, chosen, out, lse, ctx.size, ctx.scale, ctx.own)
    return (*grads, None, None, None, None)


_once = first_derivatives_only("routed_attend", "saccade.attend with a mask and backend='reference' has all")
attend_chosen.register_autograd(_once(_backward), setup_context=_setup)


def _blocks(x_BKMD: Tensor, size: int) -> Tensor:
    """(B K n, S, D)"""
    return x_BKMD.reshape(-1, size, x_BKMD.shape[3])


def _own_blocks(q: Tensor, k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The key and value block of each query block, (B H N/S, S, D)."""
    start = k.shape[2] - q.shape[2]
    k_own, v_own = (_blocks(repeat_heads(x[:, :, start:], q.shape[1]), size) for x in (k, v))
    return k_own, v_own


def _own_gradients(x: Tensor, B: int, K: int, n: int, own: int, wide: torch.dtype) -> Tensor:
    """Gradients of the own blocks (B H own, S, D), summed over the heads that share keys, among all n blocks."""
    summed = x.reshape(B, K, -1, own, *x.shape[1:]).sum(2, dtype=wide)
    return F.pad(summed, (0, 0, 0, 0, n - own, 0)).flatten(0, 2)


def _merge_weights(lse: Tensor, parts: Tensor) -> tuple[Tensor, Tensor]:
    """LSE of the union (...), and the weight of each part (..., 1 + j); 0 where nothing is attended."""
    every = torch.cat([lse[..., None], parts], -1)
    merged = every.logsumexp(-1)
    weights = (every - merged[..., None].masked_fill(merged[..., None] == float("-inf"), 0.0)).exp()
    return merged, weights


def _gather(room: Scratch, *sources: tuple[Tensor, Tensor]) -> list[Tensor]:
    """Chosen rows of some tensors, side by side in working memory; until the next call."""
    flat = room("gathered", sum(index.shape[0] * x[0].numel() for x, index in sources))
    gathered, start = [], 0
    for x, index in sources:
        area = flat[start : start + index.shape[0] * x[0].numel()].view(-1, *x.shape[1:])
        gathered.append(torch.index_select(x, 0, index, out=area))
        start += area.numel()
    return gathered
