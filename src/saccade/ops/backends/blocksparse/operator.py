"""The forward and the backward pass over pieces of blocks.

    s = scale * q_i K_S^T + b_iS,   P = softmax(s),   out_i = P V_S,   lse_i = log sum exp(s)
    dP = d out V_S^T,   ds = P * (dP - delta + d lse),   delta = rowsum(d out * out)
    dV_S += P^T d out,  dq_i = scale * ds K_S,  dK_S += scale * ds^T q_i,  db = the sum of ds over each block

Shape letters: N queries, M keys, D head dim of q and k, E head dim of v; R query blocks of all heads, r those of one
piece, P pairs of a query block and a key block, S the key blocks of a query block side by side, q and k positions
within a query and a key block.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, log
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from saccade.ops import native
from saccade.ops.autocast import off, working_dtype
from saccade.ops.backends.blocksparse.buffers import PieceBuffers, from_blocks, to_blocks
from saccade.ops.blocks import BlockStructure, Piece, WorkList
from saccade.ops.grad import first_derivatives_only, needs_grad
from saccade.ops.masks import Mask
from saccade.ops.merge import merge
from saccade.ops.native import blocks as native_blocks
from saccade.ops.native.changes import Changes, added_values
from saccade.ops.score_mods import Added, SoftCap
from saccade.ops.scratch import scratch

#: bytes of a piece's scores and gathered keys (with backward, of their gradients too): little enough for the last-level
#: cache, enough to make the dozen calls per piece cheap (measured)
PIECE_BYTES = 8 * 2**20

#: the same on an accelerator: enough to fill it
DEVICE_PIECE_BYTES = 2**25

#: bytes of keys and values that pieces pick their blocks from at a time, for the same reason
GROUP_BYTES = 2**24

#: largest |score| / log 2 at which exp2(score) needs no maximum taken off, in float32 as in float64
SAFE_EXPONENT = 60.0


def attend_blocks_of(
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
    compute = working_dtype(dtype)
    B, H, N, D = q.shape
    M, E = k.shape[2], v.shape[3]
    values = added_values(steps, N, M)
    # the C code reads bfloat16 queries as they are, and writes its output so; gradients want both in single precision
    as_given = dtype == torch.bfloat16 and not needs_grad(q, k, v, block_bias, *values)
    if not as_given or native.refusal(q.device, dtype) is not None:
        q = q.to(compute)
    k, v = k.to(compute), v.to(compute)
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
    out, lse = _BlockSparse.apply(q, k, v, block_bias, job, *values)
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
        q_R, k_R, v_R = to_blocks(q, s.block_q), to_blocks(k, s.block_k), to_blocks(v, s.block_k)
        out_R, grad_out_R = to_blocks(out, s.block_q), to_blocks(grad_out, s.block_q)
        lse_R = to_blocks(lse[..., None], s.block_q)
        grad_lse_R = None if grad_lse is None else to_blocks(grad_lse[..., None], s.block_q)
        grad_q_R, grad_k_R, grad_v_R = torch.zeros_like(q_R), torch.zeros_like(k_R), torch.zeros_like(v_R)
        grad_bias = None if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)

        with off(q.device.type), scratch("blocksparse", q.dtype, q.device) as room:
            for work in job.work_lists():
                buffers = PieceBuffers(room, s, D, E, work.pieces, backward=True)
                for piece, rows, pairs in work.pieces_with_blocks():
                    d = buffers(piece)
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
            from_blocks(grad_q_R, q.shape),
            from_blocks(grad_k_R, k.shape),
            from_blocks(grad_v_R, v.shape),
            grad_bias,
            None,
        )


def _forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, job: _Job, wants_lse: bool) -> tuple[Tensor, Tensor]:
    """Output and LSE; the latter is that of cut rows alone unless it is wanted."""
    s, D, E = job.structure, q.shape[3], v.shape[3]
    q_R, k_R, v_R = to_blocks(q, s.block_q), to_blocks(k, s.block_k), to_blocks(v, s.block_k)
    out_R = q.new_zeros(q_R.shape[0], s.block_q, E)
    lse_R = q.new_full((q_R.shape[0], s.block_q, 1), float("-inf"))
    bounded = bias is None and _largest_score(q, k) * abs(job.scale) <= SAFE_EXPONENT * log(2)
    tiny = torch.finfo(q.dtype).tiny
    with off(q.device.type), scratch("blocksparse", q.dtype, q.device) as room:
        for work in job.work_lists():
            buffers = PieceBuffers(room, s, D, E, work.pieces, backward=False)
            for piece, rows, pairs in work.pieces_with_blocks():
                d = buffers(piece)
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
                        so_far = out_R[rows], lse_R[rows][..., 0]
                        out_rqE, merged_rq = merge(*so_far, d.rows, lse_rq[..., 0])
                        d.rows.copy_(out_rqE)
                        lse_rq = merged_rq[..., None]
                    lse_R.index_copy_(0, rows, lse_rq)
                out_R.index_copy_(0, rows, d.rows)
    return from_blocks(out_R, (*q.shape[:3], E)), from_blocks(lse_R, (*q.shape[:3], 1))[..., 0]


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
