"""Block attention by routing: each query attends its own key block, causally, and the blocks that were chosen for it.

    out_i = softmax over { j <= i : j // S = i // S }  u  { j : j // S in chosen_i }  of (scale q_i . k_j)  v_j

Per (key block, head) the queries that chose it are listed (one sort), cut into tiles of one size, and each tile is
attended to its block densely; the parts of a query are merged by their LSEs. The backward pass gives every part the
*merged* output and LSE, which makes the parts' own gradients exact. The choice has no gradient.

Tiles have a size that depends on shapes alone and list their queries in order: what a query gets is the same, bit for
bit, whatever later queries choose.

Shape letters: B batch, H query heads, K key heads (K divides H), N queries, M keys, D head dim, S tokens per block,
n blocks, j blocks chosen per query, R = B H N query rows, T tiles, t queries per tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import native
from saccade.ops.backends.sdpa import in_rows, positive_scale
from saccade.ops.export import exporting, weigh
from saccade.ops.grad import first_derivatives_only
from saccade.ops.heads import repeat_heads
from saccade.ops.native.routes import attend_routes, by_block, route_gradients
from saccade.ops.scratch import KEPT_BYTES, Scratch, scratch

__all__ = ["BlockLayout", "block_layout", "routed_attend"]

#: bytes of partial outputs that wait for their merge; longer inputs are done in several ranges of queries
_WAITING = 64 * 2**20
#: bytes that one piece of tiles may touch: many tiles a call, because each call waits for all threads
_PIECE = 32 * 2**20
#: queries of an own block that are attended at once: SDPA on the CPU computes the later half of their keys in vain
_STRIP = 256
#: bytes of partial outputs that are merged at once
_MERGED = 2**21


def routed_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    chosen_BHNj: Tensor,
    block_size: int,
    *,
    scale: float | None = None,
    own: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attention of each query over its own block up to itself, and over all of the blocks chosen for it.

    Exact gradients for q, k and v, also through the LSE. Time O(N (j + 1/2) S D) per head, memory linear in N j.

    Args:
        q_BHND: queries; they are the last N of the M tokens.
        k_BKMD, v_BKME: keys and values; M is a multiple of `block_size` (pad, and choose no block with padding).
        chosen_BHNj: integers, the key blocks of each query, none twice; -1 is none.
        block_size: S.
        scale: factor of the dot product, D ** -0.5 where None.
        own: attend the own block; N must then be a multiple of S too, and no query may choose its own block.

    Returns:
        out (B, H, N, E) and the natural-log LSE (B, H, N); 0 and -inf for a query that attends to nothing.

    Raises:
        ValueError: if the shapes do not fit.
    """
    B, H, N, D = q_BHND.shape
    K, M, E = k_BKMD.shape[1], k_BKMD.shape[2], v_BKME.shape[3]
    if M % block_size or (own and (N % block_size or N > M)):
        raise ValueError(
            f"queries and keys must fill whole blocks of {block_size}, and M >= N; got N = {N} and M = {M}"
        )
    if chosen_BHNj.shape[:3] != (B, H, N) or chosen_BHNj.is_floating_point():
        raise ValueError(f"chosen must be integers of shape ({B}, {H}, {N}, j), got {tuple(chosen_BHNj.shape)}")
    if k_BKMD.shape != (B, K, M, D) or v_BKME.shape != (B, K, M, E) or H % K:
        raise ValueError(
            f"queries {tuple(q_BHND.shape)}, keys {tuple(k_BKMD.shape)} and values {tuple(v_BKME.shape)} do not fit"
        )
    q_BHND, scale = positive_scale(q_BHND, D**-0.5 if scale is None else float(scale))
    if 0 in (B, H, N, M):
        return q_BHND.new_zeros(B, H, N, E), q_BHND.new_full((B, H, N), float("-inf"), dtype=torch.float32)
    if exporting():
        return _all_pairs(q_BHND, k_BKMD, v_BKME, chosen_BHNj, block_size, scale, own)
    # the kernels want one width; zeros add nothing to a dot product or to a sum
    width = max(D, E)
    q, k, v = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (q_BHND, k_BKMD, v_BKME))
    out, lse = _routed(q, k, v, chosen_BHNj, block_size, scale, own)
    return out[..., :E], lse


def _all_pairs(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int, scale: float, own: bool
) -> tuple[Tensor, Tensor]:
    (B, H, N, _), M = q.shape, k.shape[2]
    k, v = (repeat_heads(x, H) for x in (k, v))
    blocks = torch.zeros(B, H, N, M // size + 1, dtype=torch.bool, device=q.device)
    blocks = blocks.scatter(3, torch.where(chosen < 0, M // size, chosen).long(), True)
    seen = blocks[..., :-1].repeat_interleave(size, 3)
    if own:
        key = torch.arange(M, device=q.device)
        place = key[M - N :, None]
        seen = seen | ((key // size == place // size) & (key <= place))
    return weigh(((q * scale) @ k.mT).masked_fill(~seen, float("-inf")), v)


@torch.library.custom_op(
    "saccade::routed_attend",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor chosen, int size, float scale, bool own) -> (Tensor, Tensor)",
)
def _routed(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int, scale: float, own: bool) -> Any:
    B, H, N, D = q.shape
    if native.refusal(q.device, q.dtype) is None:
        out, lse = attend_routes(q.float(), k.float(), v.float(), chosen, size, scale, own)
        return out.to(q.dtype).contiguous(), lse
    rows, k_blocks, v_blocks = q.reshape(B * H * N, D), _blocks(k, size), _blocks(v, size)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if own:
        out, lse = _own_forward(rows.view(-1, size, D), *_own_blocks(q, k, v, size), scale)
        out, lse = out.reshape(B * H, N, D).to(wide), lse.reshape(B * H, N)
    else:
        out, lse = (
            rows.new_zeros(B * H, N, D, dtype=wide),
            rows.new_full((B * H, N), float("-inf"), dtype=wide),
        )

    with scratch("routed", q.dtype, q.device) as room:
        for first, last in _ranges(chosen, D, q.dtype.itemsize):
            routes = _route(chosen[:, :, first:last], k.shape[1], k.shape[2] // size, first, N)
            part_out = rows.new_empty(routes.slots + 1, D)
            part_lse = lse.new_empty(routes.slots + 1)
            # the slot past the end is what "no block" reads
            part_out[-1], part_lse[-1] = 0.0, float("-inf")
            for tiles, slots in routes.pieces(size, D, q.dtype.itemsize):
                blocks, picked = routes.blocks[tiles], routes.rows[slots]
                q_tiles, k_tiles, v_tiles = _gather(room, (rows, picked), (k_blocks, blocks), (v_blocks, blocks))
                q_tiles = q_tiles.view(-1, routes.tile, D)
                tile_out, tile_lse = _tiles_forward(q_tiles, k_tiles, v_tiles, scale, causal=False)
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


@_routed.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int, scale: float, own: bool) -> Any:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
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
    if grad_lse is not None:
        # d s = P (dP - rowsum(dO O) + dLSE): a column of 0 in v, 1 in out and -dLSE in d out brings dLSE in
        q, k, v = F.pad(q, (0, 1)), F.pad(k, (0, 1)), F.pad(v, (0, 1))
        out = torch.cat([out, torch.ones_like(out[..., :1])], -1)
        grad = torch.cat([grad, -grad_lse[..., None].to(grad.dtype)], -1)
    B, H, N, D = q.shape
    K, n = k.shape[1], k.shape[2] // size
    q_rows, k_blocks, v_blocks = q.reshape(-1, D), _blocks(k, size), _blocks(v, size)
    out_rows, grad_rows, lse_rows = out.reshape(-1, D), grad.reshape(-1, D), lse.reshape(-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if own:
        grad_own, q_own, out_own = (x.view(-1, size, D) for x in (grad_rows, q_rows, out_rows))
        dq, dk, dv = _tiles_backward(
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

    for first, last in _ranges(chosen, D, q.dtype.itemsize):
        routes = _route(chosen[:, :, first:last], K, n, first, N)
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
            dq_tiles, dk_tiles, dv_tiles = _tiles_backward(
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
_routed.register_autograd(_once(_backward), setup_context=_setup)


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


def _ranges(chosen: Tensor, width: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of queries whose partial outputs fit into `_WAITING` bytes."""
    B, H, N, j = chosen.shape
    if j == 0:
        return
    step = max(1, _WAITING // (B * H * j * width * itemsize))
    pieces = -(-N // step)
    step = -(-N // pieces)
    for first in range(0, N, step):
        yield first, min(first + step, N)


@dataclass(frozen=True)
class _Routes:
    """Which query rows stand where: T tiles of `tile` slots, each tile for one key block."""

    tile: int
    blocks: Tensor  # (T,) key block, among B K n
    rows: Tensor  # (T t,) query row, among R; 0 where the slot is spare
    spare: Tensor  # (T t,) bool
    slot_of: Tensor  # (B H, queries, j) slot of each choice; T t where none was made

    @property
    def slots(self) -> int:
        return self.rows.shape[0]

    def pieces(self, size: int, width: int, itemsize: int) -> Iterator[tuple[slice, slice]]:
        """Slices of tiles and of slots that are attended in one call."""
        # what is gathered of a piece fits into the memory that is kept
        step = max(1, min(_PIECE, KEPT_BYTES) // ((2 * size + 2 * self.tile) * width * itemsize))
        for first in range(0, self.blocks.shape[0], step):
            last = min(first + step, self.blocks.shape[0])
            yield slice(first, last), slice(first * self.tile, last * self.tile)


def _route(chosen: Tensor, K: int, n: int, first: int, N: int) -> _Routes:
    """List the queries of each (batch row, head, block) in order, in tiles; `chosen` starts at query `first` of N."""
    B, H, Q, j = chosen.shape
    device = chosen.device
    groups, share = B * H * n, H // K
    ordered, order, counts = by_block(chosen, K, n)

    # about half of an average group: larger tiles run faster, smaller ones leave fewer spare slots
    average = max(1, chosen.numel() // groups)
    tile = min(192, max(16, 1 << (average.bit_length() - 2 if average > 1 else 0)))
    tiles = (counts + tile - 1) // tile
    ends, starts = tiles.cumsum(0), counts.cumsum(0) - counts
    total, made = torch.stack([ends[-1], counts.sum()]).tolist()

    ordered, order = ordered[:made].long(), order[:made]
    rank = torch.arange(made, device=device) - starts[ordered]
    slot = (ends - tiles)[ordered] * tile + rank
    query = order // j
    rows = torch.zeros(total * tile, dtype=torch.long, device=device)
    rows[slot] = query // Q * N + query % Q + first
    spare = torch.ones(total * tile, dtype=torch.bool, device=device)
    spare[slot] = False
    slot_of = torch.full((B * H * Q * j,), total * tile, dtype=torch.long, device=device)
    slot_of[order] = slot

    of_tile = torch.repeat_interleave(torch.arange(groups, device=device), tiles, output_size=total)
    return _Routes(tile, of_tile // share, rows, spare, slot_of.view(B * H, Q, j))


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


def _own_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Causal attention of blocks (T, S, D) to themselves, strip by strip, with LSE (T, S)."""
    size = q.shape[1]
    if q.device.type != "cpu" or size < 2 * _STRIP:
        return _tiles_forward(q, k, v, scale, causal=True)
    q, k, v = (in_rows(x) for x in (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
    place = torch.arange(size)
    for first in range(0, size, _STRIP):
        last = min(first + _STRIP, size)
        ahead = place[:last] > place[first:last, None]
        hidden = torch.zeros(ahead.shape, dtype=q.dtype).masked_fill_(ahead, float("-inf"))
        strip_out, strip_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, None, first:last], k[:, None, :last], v[:, None, :last], 0.0, False,
            attn_mask=hidden[None, None], scale=scale,
        )  # fmt: skip
        out[:, first:last], lse[:, first:last] = strip_out[:, 0], strip_lse[:, 0]
    return out, lse


def _tiles_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of (T, t, D) over (T, S, D), with LSE (T, t)."""
    if q.device.type != "cpu":
        return _forward_by_matmul(q, k, v, scale, causal=causal)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(in_rows(x)[:, None] for x in (q, k, v)), 0.0, causal, scale=scale
    )
    return out[:, 0], lse[:, 0]


def _forward_by_matmul(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    scores = _scores(q, k, scale, causal)
    lse = scores.logsumexp(-1)
    return torch.bmm((scores - lse[..., None]).exp().to(v.dtype), v), lse


def _tiles_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v given the output and LSE of the whole row, of which this block is a part."""
    if q.device.type != "cpu":
        return _backward_by_matmul(grad, q, k, v, out, lse, scale, causal=causal)
    dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *(in_rows(x)[:, None] for x in (grad, q, k, v, out)), lse[:, None], 0.0, causal, scale=scale
    )
    return dq[:, 0], dk[:, 0], dv[:, 0]


def _backward_by_matmul(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    weights = (_scores(q, k, scale, causal) - lse[..., None]).exp()
    delta = (grad.to(weights.dtype) * out.to(weights.dtype)).sum(-1, keepdim=True)
    d_scores = (weights * (torch.bmm(grad, v.mT).to(weights.dtype) - delta) * scale).to(q.dtype)
    return torch.bmm(d_scores, k), torch.bmm(d_scores.mT, q), torch.bmm(weights.to(q.dtype).mT, grad)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = torch.bmm(q, k.mT)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) * scale
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    return scores


@dataclass(frozen=True)
class BlockLayout:
    """Several sequences in a batch row, each laid out from the start of a block.

    Attributes:
        source_BL: token at each place of the layout (L = n S), or the number of tokens where the place is empty.
        place_BN: place of each token, or L where it belongs to no sequence.
        document_Bn: sequence of each block; -1 for an empty block.
        start_Bn: first block of that sequence.
    """

    source_BL: Tensor
    place_BN: Tensor
    document_Bn: Tensor
    start_Bn: Tensor

    def align(self, x_BHND: Tensor, *, first: int = 0) -> Tensor:
        """Tokens to places; empty places are 0. `x` holds the tokens from `first` on."""
        last = x_BHND.shape[2]
        index = self.source_BL - first
        index = torch.where((index < 0) | (index > last), last, index)
        return _pick(F.pad(x_BHND, (0, 0, 0, 1)), index)

    def restore(self, x_BHLD: Tensor, *, first: int = 0) -> Tensor:
        """Places to tokens, from token `first` on; tokens of no sequence get 0."""
        return _pick(F.pad(x_BHLD, (0, 0, 0, 1)), self.place_BN[:, first:])


def _pick(x_BHND: Tensor, index_BL: Tensor) -> Tensor:
    B, H, _, D = x_BHND.shape
    return x_BHND.gather(2, index_BL[:, None, :, None].expand(B, H, -1, D))


def block_layout(ids_BN: Tensor, block_size: int, *, blocks: int | None = None) -> BlockLayout:
    """Lay each sequence of a batch row from the start of a block; ids below 0 belong to no sequence.

    Args:
        ids_BN: integers, one per sequence of the row; tokens of a sequence keep their order.
        block_size: S.
        blocks: number of blocks n to make room for, where it is known; otherwise what the fullest row needs.
    """
    B, N = ids_BN.shape
    device = ids_BN.device
    nobody = ids_BN < 0
    last = torch.iinfo(torch.int64).max
    ordered, order = ids_BN.long().masked_fill(nobody, last).sort(dim=-1, stable=True)
    place = torch.arange(N, device=device).expand(B, N)
    new = torch.ones_like(nobody)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    real = ordered != last
    sequence = new.long().cumsum(-1) - 1
    rank = place - torch.where(new, place, 0).cummax(-1).values
    opens = (rank % block_size == 0) & real
    block = opens.long().cumsum(-1) - 1
    n = int(opens.sum(-1).max()) if blocks is None else blocks
    L = n * block_size

    where = torch.where(real, block * block_size + rank % block_size, L)
    place_BN = torch.empty_like(where).scatter_(1, order, where)
    source = torch.full((B, L + 1), N, dtype=torch.long, device=device).scatter_(1, where, order)[:, :L]
    target = torch.where(opens, block, n)
    document = torch.full((B, n + 1), -1, dtype=torch.long, device=device).scatter_(1, target, sequence)[:, :n]
    first = torch.zeros(B, n + 1, dtype=torch.long, device=device).scatter_(1, target, block - rank // block_size)
    return BlockLayout(source, place_BN, document, first[:, :n])
