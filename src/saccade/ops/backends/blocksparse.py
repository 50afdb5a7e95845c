"""Softmax attention that computes only the blocks with work to do, forward and backward.

With S(i) the key blocks that query block i visits, K_S their keys side by side, and b an optional bias per block,

    s = scale * q_i K_S^T + b_iS,   P = softmax(s),   out_i = P V_S,   lse_i = log sum exp(s)

and backwards, with delta = rowsum(d out * out),

    dP = d out V_S^T,   ds = P * (dP - delta + d lse),
    dV_S += P^T d out,  dq_i = scale * ds K_S,  dK_S += scale * ds^T q_i,  db = the sum of ds over each block

`saccade.ops.blocks` makes the pieces in which that is done: the key blocks of a piece are gathered into a batch that
stays in cache, and P is computed again in the backward pass. Extra memory is two gathered batches and two tiles of
scores. Half precision is computed in float32. On the CPU `saccade.ops.native` does it in C where it can.

Windows and neighbourhoods are regular, which `saccade.ops.windows` uses: `run` hands those over.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v;
n, m blocks of queries and keys; R query blocks of all heads, r those of one piece, c key blocks of each of them,
q and k positions within a query and a key block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log, prod
from types import SimpleNamespace
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks, native, windows
from saccade.ops.autocast import off
from saccade.ops.backends import stream
from saccade.ops.blocks import BlockStructure, Piece, WorkList
from saccade.ops.export import exporting, weigh
from saccade.ops.grad import first_derivatives_only, needs_grad
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import FULL, PARTIAL, Mask
from saccade.ops.masks.block_states import size_pair
from saccade.ops.merge import merge
from saccade.ops.native import blocks as native_blocks
from saccade.ops.native.changes import Changes, added_values
from saccade.ops.planning import PLANNING_BLOCK, Problem, nothing, own_block_size
from saccade.ops.score_mods import Added, SoftCap, steps
from saccade.ops.scratch import Scratch, scratch

__all__ = ["blocksparse_attend"]

#: bytes of a piece's scores and gathered keys (with backward, of their gradients too): little enough for the last-level
#: cache, enough to make the dozen calls per piece cheap (measured)
PIECE_BYTES = 8 * 2**20

#: the same on an accelerator: enough to fill it
DEVICE_PIECE_BYTES = 2**25

#: bytes of keys and values that pieces pick their blocks from at a time, for the same reason
GROUP_BYTES = 2**24

#: largest |score| / log 2 at which exp2(score) needs no maximum taken off, in float32 as in float64
SAFE_EXPONENT = 60.0

#: query rows of a key head whose attention takes as long as laying out its keys and values for C (measured)
LAYOUT_ROWS = 45


def refusal(problem: Problem) -> str | None:
    if problem.score is not None:
        return "scores are dot products here"
    if problem.score_mod is not None and (why_not := _cannot_modify(problem)):
        return why_not
    if problem.normalize != "softmax":
        return f"softmax only, not {problem.normalize!r}"
    if problem.dropout:
        return "no dropout here"
    return None


def _cannot_modify(problem: Problem) -> str | None:
    """Why scores are not modified here, or None."""
    if _regular(problem) is not None:
        return None  # a bias on the mask's own grid
    if steps(problem.score_mod) is None:
        return "of modifications of scores only those of saccade.score_mods"
    if why_not := native.forecast(problem.device, problem.dtype):
        return f"scores are modified in C only ({why_not})"
    if torch.compiler.is_compiling():
        return "no modified scores in a compiled graph"
    if 0 in (problem.B, problem.H, problem.N, problem.M):
        return "nothing to modify"
    return None


def share(problem: Problem) -> float:
    """Measured: in C at 1.2 times SDPA's rate; in torch pieces run at three quarters of it, slower where masked, and a
    call and a piece cost a moment."""
    in_c = native.forecast(problem.device, problem.dtype) is None
    layout = LAYOUT_ROWS * problem.K / max(1, problem.N * problem.H) if in_c else 0.0
    if (fast := _regular(problem)) is not None:
        return float(fast.share(problem)) + layout
    states = problem.coarse_map
    partial = float((states == PARTIAL).float().mean().item()) if states.numel() else 0.0
    block_q, block_k = problem.block_size
    pairs = problem.B * problem.H * problem.N * problem.M
    if in_c:
        return problem.density * 0.82 + 0.1 * partial + layout + 4e-4 / problem.dense_seconds
    bytes_per_pair = block_k * (max(problem.D, problem.E) + block_q) * 4
    pieces = problem.density * pairs / (block_q * block_k) * bytes_per_pair / PIECE_BYTES
    return problem.density / 0.75 + partial + (6e-4 + 5e-5 * pieces) / problem.dense_seconds


def extra_bytes(problem: Problem) -> int:
    if (fast := _regular(problem)) is not None:
        return int(fast.extra_bytes(problem))
    # backward: two tiles of scores, gathered keys and values; half precision is copied to float32
    pieces = min(PIECE_BYTES, int(problem.memory_mb * 2**20))
    return pieces + (2 * problem.io_bytes if problem.dtype.itemsize == 2 else 0)


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    if (fast := _regular(problem)) is not None:
        return fast.run(problem, q, k, v)
    if problem.score_mod is not None and native.refusal(q.device, q.dtype) is not None:
        return stream.run(problem, q, k, v)  # the compiler that was there has failed
    return _attend(
        q, k, v, problem.mask, problem.block_map, problem.block_size, None,
        problem.scale, problem.return_lse, problem.memory_mb, steps(problem.score_mod) or (),
    )  # fmt: skip


def _every_block(N: int, M: int, block_size: tuple[int, int], device: torch.device) -> Tensor:
    shape = (1, 1, ceil(N / block_size[0]), ceil(M / block_size[1]))
    return torch.full(shape, FULL, dtype=torch.int8, device=device)


def _regular(problem: Problem) -> Any:
    """The module of regular patterns where it takes this problem, else None."""
    return windows if windows.regular(problem) is not None else None


@overload
def blocksparse_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    mask: Mask | Tensor | None,
    *,
    block_size: int | Sequence[int] | None = None,
    block_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    memory_mb: float = 64.0,
) -> Tensor: ...


@overload
def blocksparse_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    mask: Mask | Tensor | None,
    *,
    block_size: int | Sequence[int] | None = None,
    block_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    memory_mb: float = 64.0,
) -> tuple[Tensor, Tensor]: ...


def blocksparse_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    mask: Mask | Tensor | None,
    *,
    block_size: int | Sequence[int] | None = None,
    block_bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    memory_mb: float = 64.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_i = sum_j P_ij v_j,  P = softmax_j(scale * q_i . k_j + bias of the block of (i, j)), over what `mask` allows.

    Work and time are proportional to the blocks that the mask keeps; the elementwise mask is evaluated only in blocks
    that it keeps in part. Gradients reach q, k, v and the bias, from the output and from the LSE. A query that may
    attend to nothing gives zeros and LSE -inf.

    Args:
        q_BHND: queries.
        k_BKMD: keys; K divides H.
        v_BKME: values; E may differ from D.
        mask: a mask of `saccade.masks`; or a bool block map (B or 1, H or 1, n, m), True = the block is attended,
            with `block_size`; or None for all blocks.
        block_size: tokens per block, an int or (query, key), 1 to 4096. Default: the mask's own, or else 64.
        block_bias: added to all scores of a block, (B or 1, H or 1, n, m); -inf leaves the block out.
        scale: D ** -0.5 where None.
        return_lse: also return the natural log of the sum of the exponentials, (B, H, N), float32 (float64 for double).
        memory_mb: bound of the working buffers, in MiB.

    Returns:
        out (B, H, N, E), or (out, lse).

    Raises:
        ValueError: if shapes do not fit each other or the blocks.
    """
    B, H, N, D = q_BHND.shape
    K, M = k_BKMD.shape[1:3]
    if K == 0 or H % K:
        raise ValueError(f"the key heads must divide the query heads ({H}), got {K}")
    if k_BKMD.shape != (B, K, M, D) or v_BKME.shape[:3] != (B, K, M):
        raise ValueError(
            f"query, key and value do not fit: {tuple(q_BHND.shape)}, {tuple(k_BKMD.shape)}, {tuple(v_BKME.shape)}"
        )
    if memory_mb <= 0:
        raise ValueError(f"memory_mb must be positive, got {memory_mb}")
    if block_size is None:
        if isinstance(mask, Tensor):
            raise ValueError("a block map needs block_size")
        own = own_block_size(mask)
        size = own or (PLANNING_BLOCK, PLANNING_BLOCK)
    else:
        size = size_pair(block_size, "block_size")
        if max(size) > 4096:
            raise ValueError(f"block_size must be between 1 and 4096, got {block_size}")
    if isinstance(mask, Tensor):
        mask = masks.blocks(mask, size)
    if exporting():
        both = _all_pairs(q_BHND, k_BKMD, v_BKME, mask, size, block_bias, D**-0.5 if scale is None else scale)
        return both if return_lse else both[0]
    n, m = ceil(N / size[0]), ceil(M / size[1])
    if mask is None:
        states = _every_block(N, M, size, q_BHND.device)
    else:
        if mask.batch not in (1, B) or mask.heads not in (1, H):
            raise ValueError(f"mask is for {mask.batch} batch rows and {mask.heads} heads, got {B} and {H}")
        mask.check(N, M)
        states = mask.block_map(N, M, size, q_BHND.device)
    if block_bias is not None:
        shape = tuple(block_bias.shape)
        if block_bias.ndim != 4 or shape[0] not in (1, B) or shape[1] not in (1, H) or shape[2:] != (n, m):
            raise ValueError(f"block_bias must have shape ({B} or 1, {H} or 1, {n}, {m}), got {shape}")
        left_out = block_bias.detach() == float("-inf")
        states = states * ~left_out
        block_bias = block_bias.masked_fill(left_out, 0.0)
    if 0 in (B, H, N, M):
        found = nothing(q_BHND, k_BKMD, v_BKME)
        return found if return_lse else found[0]
    scale = D**-0.5 if scale is None else float(scale)
    out, lse = _attend(q_BHND, k_BKMD, v_BKME, mask, states, size, block_bias, scale, return_lse, memory_mb)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _all_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    block_size: tuple[int, int],
    block_bias: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    scores = (q * scale) @ k.mT
    if block_bias is not None:
        over_keys = block_bias.repeat_interleave(block_size[1], 3)[..., : k.shape[2]]
        scores = scores + over_keys.repeat_interleave(block_size[0], 2)[:, :, : q.shape[2]]
    if mask is not None:
        scores = scores.masked_fill(~mask.dense(q.shape[2], k.shape[2], q.device), float("-inf"))
    return weigh(scores, v)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None,
    states: Tensor,
    block_size: tuple[int, int],
    block_bias: Tensor | None,
    scale: float,
    return_lse: bool,
    memory_mb: float,
    steps: tuple[Added | SoftCap, ...] = (),
) -> tuple[Tensor, Tensor | None]:
    dtype = q.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    B, H, N, D = q.shape
    M, E = k.shape[2], v.shape[3]
    if block_bias is not None:
        block_bias = block_bias.to(compute).expand(B, H, -1, -1)
    block_q, block_k = block_size
    # per pair of a query block and a key block: the gathered block, and a tile of scores; backward holds each twice
    bytes_per_pair = block_k * (max(D, E) + block_q) * compute.itemsize
    tiles = 2 if needs_grad(q, k, v, block_bias) else 1
    limit = memory_mb * 2**20 / tiles
    aim = min(limit, (PIECE_BYTES if q.device.type == "cpu" else DEVICE_PIECE_BYTES) / tiles)
    structure = BlockStructure(
        states=states,
        mask=mask,
        B=B,
        H=H,
        K=k.shape[1],
        N=N,
        M=M,
        block_q=block_q,
        block_k=block_k,
        widest=max(1, min(ceil(M / block_k), int(limit / bytes_per_pair))),
        pairs_per_piece=max(1, int(aim / bytes_per_pair)),
        heads_per_group=max(1, int(GROUP_BYTES / (compute.itemsize * max(1, M) * (D + E)))),
    )
    job = _Job(structure, scale, return_lse, steps)
    out, lse = _BlockSparse.apply(q, k, v, block_bias, job, *added_values(steps, N, M))
    return out.to(dtype), lse if return_lse else None


@dataclass
class _Job:
    """What one call computes; the work list is remembered for the backward pass where there is only one."""

    structure: BlockStructure
    scale: float
    return_lse: bool
    steps: tuple[Added | SoftCap, ...] = ()
    _remembered: list[WorkList] | None = None

    def changes(self, values: Sequence[Tensor]) -> Changes:
        """What becomes of scores, in C; values: what is added to them."""
        s = self.structure
        return Changes(self.steps, values, (s.B, s.H, s.N, s.M))

    def work_lists(self) -> Iterable[WorkList]:
        if self._remembered is not None:
            return self._remembered
        lists = self.structure.work_lists()
        if not self.structure.is_one_list:
            return lists
        self._remembered = list(lists)
        return self._remembered


def _to_blocks(x_BHND: Tensor, block: int) -> Tensor:
    """(B, H, N, D) as contiguous blocks (B * H * n, block, D), the last of each head filled up with zeros."""
    B, H, N, D = x_BHND.shape
    if N % block:
        x_BHND = F.pad(x_BHND, (0, 0, 0, -N % block))
    return x_BHND.reshape(B * H * ceil(N / block), block, D)


def _from_blocks(x: Tensor, like_BHND: Sequence[int]) -> Tensor:
    B, H, N, D = like_BHND
    return x.view(B, H, -1, D)[:, :, :N] if x.numel() else x.new_zeros(like_BHND)


class _Desk:
    """Working memory for one work list, cut to the shape of the piece on it."""

    def __init__(self, room: Scratch, s: BlockStructure, D: int, E: int, pieces: list[Piece], backward: bool) -> None:
        self.s, self.D, self.E, self.backward = s, D, E, backward
        self._kind = (s.block_q, s.block_k, D, E, backward)
        rows = max((piece.rows for piece in pieces), default=0) * s.block_q
        pairs = max((piece.pairs for piece in pieces), default=0) * s.block_k
        tiles, gathered = (2, D + E) if backward else (1, max(D, E))
        # eight areas at most, each begun on a multiple of 16 elements
        size = rows * 2 * (D + E) + pairs * (tiles * s.block_q + gathered) + 8 * 16
        self._flat, self._cuts = room("all", size), room.bound

    def __call__(self, piece: Piece) -> SimpleNamespace:
        key = (piece.rows, piece.width, self._kind)
        cut = self._cuts.get(key)
        if cut is None:
            cut = self._cuts[key] = self._lay_out(piece.rows, piece.width)
        return cut

    def _lay_out(self, r: int, c: int) -> SimpleNamespace:
        s, D, E = self.s, self.D, self.E
        start = 0

        def take(*shape: int) -> Tensor:
            nonlocal start
            strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
            area = self._flat.as_strided(shape, strides, start)
            start += ceil(prod(shape) / 16) * 16
            return area

        d = SimpleNamespace()
        d.scores = take(r, s.block_q, c * s.block_k)
        d.queries = take(r, s.block_q, D)
        d.rows = take(r, s.block_q, E)
        d.keys_P = take(r * c, s.block_k, D)
        if not self.backward:
            start -= ceil(d.keys_P.numel() / 16) * 16  # values are gathered when the keys are done with
        d.values_P = take(r * c, s.block_k, E)
        d.keys, d.values = d.keys_P.view(r, -1, D), d.values_P.view(r, -1, E)
        if self.backward:
            d.grad_scores = take(r, s.block_q, c * s.block_k)
            d.grads, d.grad_queries = take(r, s.block_q, E), take(r, s.block_q, D)
        return d


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, job: _Job, *values: Tensor) -> Any:
        if native.refusal(q.device, q.dtype) is None:
            out, lse = native_blocks.attend_blocks(q, k, v, job.structure, bias, job.scale, job.changes(values))
        else:
            out, lse = _forward(q, k, v, bias, job, job.return_lse or any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, bias, out, lse, *values)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @first_derivatives_only("attend on the path 'blocksparse'", "backend='reference' has all")
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, bias, out, lse, *values = ctx.saved_tensors
        job: _Job = ctx.job
        s, D, E = job.structure, q.shape[3], v.shape[3]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        if native.refusal(q.device, q.dtype) is None:
            changes = job.changes(values)
            grads = native_blocks.block_gradients(q, k, v, s, bias, job.scale, out, lse, grad_out, grad_lse, changes)
            return *grads, None, *changes.gradients()
        q_R, k_R, v_R = _to_blocks(q, s.block_q), _to_blocks(k, s.block_k), _to_blocks(v, s.block_k)
        out_R, grad_out_R = _to_blocks(out, s.block_q), _to_blocks(grad_out, s.block_q)
        lse_R = _to_blocks(lse[..., None], s.block_q)
        grad_lse_R = None if grad_lse is None else _to_blocks(grad_lse[..., None], s.block_q)
        grad_q_R, grad_k_R, grad_v_R = torch.zeros_like(q_R), torch.zeros_like(k_R), torch.zeros_like(v_R)
        grad_bias = None if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)

        with off(q.device.type), scratch("blocksparse", q.dtype, q.device) as room:
            for work in job.work_lists():
                desk = _Desk(room, s, D, E, work.pieces, backward=True)
                for piece, rows, pairs in work.pieces_with_blocks():
                    d = desk(piece)
                    _scores(q_R, k_R, bias, job, work, piece, rows, pairs, d)
                    # weights by the LSE of the whole row, also where this is a part of it; dead rows weigh nothing
                    lse_rq = lse_R[rows]
                    dead_rq = lse_rq == float("-inf")
                    d.scores.sub_(lse_rq.masked_fill_(dead_rq, float("inf")).mul_(1 / log(2))).exp2_()
                    torch.index_select(out_R, 0, rows, out=d.rows)
                    torch.index_select(grad_out_R, 0, rows, out=d.grads)
                    shift_rq = d.rows.mul_(d.grads).sum(-1, keepdim=True)
                    if grad_lse_R is not None:
                        shift_rq -= grad_lse_R[rows].masked_fill_(dead_rq, 0.0)
                    torch.index_select(v_R, 0, pairs, out=d.values_P)
                    torch.bmm(d.grads, d.values.mT, out=d.grad_scores)
                    torch.bmm(d.scores.mT, d.grads, out=d.values)
                    grad_v_R.index_add_(0, pairs, d.values_P)

                    d.grad_scores.sub_(shift_rq).mul_(d.scores)
                    if grad_bias is not None:
                        tiles = d.grad_scores.view(piece.rows, s.block_q, piece.width, s.block_k)
                        grad_bias.view(-1)[work.map_of(piece)] = tiles.sum((1, 3)).view(-1)
                    torch.baddbmm(d.grad_queries, d.grad_scores, d.keys, beta=0, alpha=job.scale, out=d.grad_queries)
                    grad_q_R.index_add_(0, rows, d.grad_queries)
                    torch.baddbmm(d.keys, d.grad_scores.mT, d.queries, beta=0, alpha=job.scale, out=d.keys)
                    grad_k_R.index_add_(0, pairs, d.keys_P)

        return (
            _from_blocks(grad_q_R, q.shape),
            _from_blocks(grad_k_R, k.shape),
            _from_blocks(grad_v_R, v.shape),
            grad_bias,
            None,
        )


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, job: _Job, wants_lse: bool) -> tuple[Tensor, Tensor]:
    """Output and LSE; the latter is that of cut rows alone unless it is wanted."""
    s, D, E = job.structure, q.shape[3], v.shape[3]
    q_R, k_R, v_R = _to_blocks(q, s.block_q), _to_blocks(k, s.block_k), _to_blocks(v, s.block_k)
    out_R = q.new_zeros(q_R.shape[0], s.block_q, E)
    lse_R = q.new_full((q_R.shape[0], s.block_q, 1), float("-inf"))
    bounded = bias is None and _largest_score(q, k) * abs(job.scale) <= SAFE_EXPONENT * log(2)
    tiny = torch.finfo(q.dtype).tiny
    with off(q.device.type), scratch("blocksparse", q.dtype, q.device) as room:
        for work in job.work_lists():
            desk = _Desk(room, s, D, E, work.pieces, backward=False)
            for piece, rows, pairs in work.pieces_with_blocks():
                d = desk(piece)
                _scores(q_R, k_R, bias, job, work, piece, rows, pairs, d)
                if not bounded:
                    # finite also where everything is -inf
                    top_rq = d.scores.amax(-1, keepdim=True).clamp_(min=-1e30)
                    d.scores.sub_(top_rq)
                total_rq = d.scores.exp2_().sum(-1, keepdim=True)
                torch.index_select(v_R, 0, pairs, out=d.values_P)
                torch.bmm(d.scores, d.values, out=d.rows)
                d.rows.div_(total_rq.clamp(min=tiny) if piece.has_partial else total_rq)
                if wants_lse or piece.cut:
                    lse_rq = total_rq.log_() if bounded else total_rq.log_().add_(top_rq, alpha=log(2))
                    if piece.cut:
                        before = out_R[rows], lse_R[rows][..., 0]
                        out_rqE, merged_rq = merge(*before, d.rows, lse_rq[..., 0])
                        d.rows.copy_(out_rqE)
                        lse_rq = merged_rq[..., None]
                    lse_R.index_copy_(0, rows, lse_rq)
                out_R.index_copy_(0, rows, d.rows)
    return _from_blocks(out_R, (*q.shape[:3], E)), _from_blocks(lse_R, (*q.shape[:3], 1))[..., 0]


def _scores(
    q_R: Tensor,
    k_R: Tensor,
    bias: Tensor | None,
    job: _Job,
    work: WorkList,
    piece: Piece,
    rows: Tensor,
    pairs: Tensor,
    d: SimpleNamespace,
) -> None:
    """Gather a piece's queries and keys, and compute its scores in units of log 2; -inf where the mask says no."""
    torch.index_select(q_R, 0, rows, out=d.queries)
    torch.index_select(k_R, 0, pairs, out=d.keys_P)
    torch.baddbmm(d.scores, d.queries, d.keys.mT, beta=0, alpha=job.scale / log(2), out=d.scores)
    if bias is None and not piece.has_partial:
        return
    tiles = d.scores.view(piece.rows, job.structure.block_q, piece.width, job.structure.block_k)
    if bias is not None:
        bias_P = bias.reshape(-1)[work.map_of(piece)]
        tiles.add_(bias_P.view(piece.rows, 1, piece.width, 1), alpha=1 / log(2))
    if piece.has_partial:
        job.structure.forbid(work, piece, tiles)


def _largest_score(q: Tensor, k: Tensor) -> float:
    """A bound of |q_i . k_j| by their lengths."""
    if not q.numel() or not k.numel():
        return 0.0
    return float(torch.linalg.vector_norm(q, dim=-1).amax() * torch.linalg.vector_norm(k, dim=-1).amax())
