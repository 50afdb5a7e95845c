"""Softmax attention that computes only the blocks with work to do, forward and backward, in pure torch.

With S(i) the key blocks that query block i visits, K_S their keys side by side, and b an optional bias per block,

    s = scale * q_i K_S^T + b_iS,   P = softmax(s),   out_i = P V_S,   lse_i = log sum exp(s)

and backwards, with delta = rowsum(d out * out),

    dP = d out V_S^T,   ds = P * (dP - delta + d lse),
    dV_S += P^T d out,  dq_i = scale * ds K_S,  dK_S += scale * ds^T q_i,  db = the sum of ds over each block

`saccade.ops.blocks` makes the pieces in which that is done: the key blocks of a piece are gathered into a batch that
stays in cache, and P is computed again in the backward pass. Extra memory is two gathered batches and two tiles of
scores. Half precision is computed in float32.

Windows and neighbourhoods are regular, which `saccade.ops.windows` uses: `run` hands those over.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim of q and k, E head dim of v;
n, m blocks of queries and keys; R query blocks of all heads, r those of one piece, c key blocks of each of them,
q and k positions within a query and a key block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from saccade.ops import masks
from saccade.ops.blocks import BlockStructure, Piece, WorkList
from saccade.ops.masks import FULL, PARTIAL, Mask
from saccade.ops.merge import merge
from saccade.ops.planning import PLANNING_BLOCK, Problem, own_block_size

__all__ = ["blocksparse_attend"]

#: score of a forbidden pair: finite, so that a row of nothing else is recognised instead of becoming NaN
FORBIDDEN = -1e30

#: bytes of a piece's buffers at which they stay in cache while torch's overhead per piece stays small (measured)
PIECE_BYTES = 6 * 2**20


def refusal(problem: Problem) -> str | None:
    if problem.score is not None or problem.score_mod is not None:
        return "scores are dot products here"
    if problem.normalize != "softmax":
        return f"softmax only, not {problem.normalize!r}"
    if problem.dropout:
        return "no dropout here"
    if problem.mask is None:
        return "there is no mask whose blocks could be skipped"
    return None


def share(problem: Problem) -> float:
    """Measured on two cores: pieces run at 0.9 of SDPA's rate, plus work lists and calls per piece."""
    if (fast := _regular(problem)) is not None and hasattr(fast, "share"):
        return float(fast.share(problem))
    states = problem.block_map
    assert states is not None
    partial = float((states == PARTIAL).float().mean().item()) if states.numel() else 0.0
    dense_seconds = 4e-11 / 4 * problem.B * problem.H * problem.N * problem.M * (problem.D + problem.E) / 2 + 1e-5
    pieces = problem.density * problem.B * problem.H * problem.N * problem.M / _scores_per_piece(problem) + 8
    return problem.density / 0.88 + 0.35 * partial + (4e-4 + 8e-5 * pieces) / dense_seconds


def extra_bytes(problem: Problem) -> int:
    if (fast := _regular(problem)) is not None and hasattr(fast, "extra_bytes"):
        return int(fast.extra_bytes(problem))
    return int(min(PIECE_BYTES * (2 if problem.needs_grad else 1), problem.memory_mb * 2**20))


def _scores_per_piece(problem: Problem) -> int:
    return PIECE_BYTES // 8


def run(problem: Problem, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
    if (fast := _regular(problem)) is not None:
        return fast.run(problem, q, k, v)
    assert problem.block_map is not None
    return _attend(
        q, k, v, problem.mask, problem.block_map, problem.block_size, None,
        problem.scale, problem.return_lse, problem.memory_mb,
    )  # fmt: skip


def _regular(problem: Problem) -> Any:
    """The module of regular patterns where it takes this problem, else None."""
    try:
        from saccade.ops import windows
    except ImportError:
        return None

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
    """out_i = sum_j P_ij v_j with P = softmax_j(scale * q_i . k_j + bias of the block of (i, j)), over what `mask` allows.

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
        size = masks._pair(block_size, "block_size")
        if max(size) > 4096:
            raise ValueError(f"block_size must be between 1 and 4096, got {block_size}")
    if isinstance(mask, Tensor):
        mask = masks.blocks(mask, size)
    n, m = ceil(N / size[0]), ceil(M / size[1])
    if mask is None:
        states = torch.full((1, 1, n, m), FULL, dtype=torch.int8, device=q_BHND.device)
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
    scale = D**-0.5 if scale is None else float(scale)
    out, lse = _attend(q_BHND, k_BKMD, v_BKME, mask, states, size, block_bias, scale, return_lse, memory_mb)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


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
) -> tuple[Tensor, Tensor | None]:
    dtype = q.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = q.to(compute), k.to(compute), v.to(compute)
    B, H, N, D = q.shape
    if block_bias is not None:
        block_bias = block_bias.to(compute).expand(B, H, -1, -1)
    block_q, block_k = block_size
    # per pair of a query block and a key block: the gathered block, and a tile of scores; backward holds each twice
    bytes_per_pair = block_k * (max(D, v.shape[3]) + block_q) * compute.itemsize
    limit = memory_mb * 2**20 / (2 if torch.is_grad_enabled() else 1)
    structure = BlockStructure(
        states=states,
        mask=mask,
        B=B,
        H=H,
        K=k.shape[1],
        N=N,
        M=k.shape[2],
        block_q=block_q,
        block_k=block_k,
        widest=max(1, int(limit / bytes_per_pair)),
        pairs_per_piece=max(1, int(min(PIECE_BYTES, limit) / bytes_per_pair)),
    )
    out, lse = _BlockSparse.apply(q, k, v, block_bias, _Job(structure, scale, return_lse))
    return out.to(dtype), lse if return_lse else None


@dataclass
class _Job:
    """What one call computes, and the work lists where there is only one of them to remember."""

    structure: BlockStructure
    scale: float
    return_lse: bool
    remembered: list[WorkList] | None = None

    def work_lists(self) -> Any:
        if self.remembered is not None:
            return self.remembered
        lists = self.structure.work_lists()
        if self.structure.is_one_list:
            self.remembered = list(lists)
            return self.remembered
        return lists


def _to_blocks(x_BHND: Tensor, block: int) -> Tensor:
    """(B, H, N, D) as contiguous blocks (B * H * n, block * D), the last of each head filled up with zeros."""
    N, D = x_BHND.shape[2:]
    if N % block:
        x_BHND = F.pad(x_BHND, (0, 0, 0, -N % block))
    return x_BHND.reshape(-1, block * D)


def _from_blocks(x: Tensor, like_BHND: Sequence[int]) -> Tensor:
    B, H, N, D = like_BHND
    return x.view(B, H, -1, D)[:, :, :N]


class _Buffers:
    """Working memory of all pieces, cut to shape for each."""

    def __init__(self, like: Tensor, **sizes: int) -> None:
        self._flat = {name: like.new_empty(size) for name, size in sizes.items()}

    def __call__(self, name: str, *shape: int) -> Tensor:
        length = 1
        for s in shape:
            length *= s
        return self._flat[name][:length].view(shape)


class _BlockSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, job: _Job) -> Any:
        s, E = job.structure, v.shape[3]
        q_R, k_R, v_R = _to_blocks(q, s.block_q), _to_blocks(k, s.block_k), _to_blocks(v, s.block_k)
        out_R = q.new_zeros(q_R.shape[0], s.block_q * E)
        lse_R = q.new_full((q_R.shape[0], s.block_q), float("-inf"))
        for work in job.work_lists():
            buffers = _buffers(q, v, s, work.pieces, backward=False)
            for piece in work.pieces:
                rows, pairs = work.rows(piece), work.pairs(piece)
                score_rqK = _scores(q_R, k_R, bias, job, work, piece, buffers)
                wants_lse = job.return_lse or piece.cut or piece.has_partial
                lse_rq, dead_rq = _softmax(score_rqK, wants_lse, piece.has_partial)
                values = torch.index_select(v_R, 0, pairs, out=buffers("keys", len(pairs), s.block_k * E))
                out_rqE = buffers("rows", piece.rows, s.block_q, E)
                torch.bmm(score_rqK, values.view(piece.rows, -1, E), out=out_rqE)
                if dead_rq is not None:
                    out_rqE.masked_fill_(dead_rq[..., None], 0.0)
                if piece.cut:
                    assert lse_rq is not None
                    before = out_R[rows].view_as(out_rqE), lse_R[rows]
                    out_rqE, lse_rq = merge(*before, out_rqE, lse_rq)
                out_R.index_copy_(0, rows, out_rqE.view(piece.rows, -1))
                if lse_rq is not None:
                    lse_R.index_copy_(0, rows, lse_rq)
        out = _from_blocks(out_R, (*q.shape[:3], E))
        ctx.save_for_backward(q, k, v, bias, out, lse_R)
        ctx.job = job
        ctx.set_materialize_grads(False)
        return out, _from_blocks(lse_R, (*q.shape[:3], 1))[..., 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, bias, out, lse_R = ctx.saved_tensors
        job: _Job = ctx.job
        s, D, E = job.structure, q.shape[3], v.shape[3]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        q_R, k_R, v_R = _to_blocks(q, s.block_q), _to_blocks(k, s.block_k), _to_blocks(v, s.block_k)
        out_R, grad_out_R = _to_blocks(out, s.block_q), _to_blocks(grad_out, s.block_q)
        grad_lse_R = None if grad_lse is None else _to_blocks(grad_lse[..., None], s.block_q)
        grad_q_R, grad_k_R, grad_v_R = torch.zeros_like(q_R), torch.zeros_like(k_R), torch.zeros_like(v_R)
        grad_bias = None if bias is None else torch.zeros_like(bias, memory_format=torch.contiguous_format)
        for work in job.work_lists():
            buffers = _buffers(q, v, s, work.pieces, backward=True)
            for piece in work.pieces:
                r, rows, pairs = piece.rows, work.rows(piece), work.pairs(piece)
                weight_rqK = _scores(q_R, k_R, bias, job, work, piece, buffers)
                lse_rq, _ = _softmax(weight_rqK, piece.cut, piece.has_partial)
                rows_q = buffers("queries", r, s.block_q, D)
                rows_o = torch.index_select(out_R, 0, rows, out=buffers("rows", r, s.block_q * E))
                rows_g = torch.index_select(grad_out_R, 0, rows, out=buffers("grads", r, s.block_q * E))
                rows_o, rows_g = rows_o.view(r, -1, E), rows_g.view(r, -1, E)
                shift_rq = rows_o.mul_(rows_g).sum(-1)
                if grad_lse_R is not None:
                    shift_rq -= grad_lse_R[rows]
                if piece.cut or piece.has_partial:
                    # the weights of a cut row are too large by exp(lse - lse of its part); those of a dead one are 0
                    whole_rq = lse_R[rows]
                    dead_rq = whole_rq == float("-inf")
                    if lse_rq is not None:
                        factor_rq = (lse_rq - whole_rq).exp_()
                        shift_rq *= factor_rq
                        rows_g *= factor_rq[..., None]
                    shift_rq.masked_fill_(dead_rq, 0.0)
                    rows_g.masked_fill_(dead_rq[..., None], 0.0)

                values = torch.index_select(v_R, 0, pairs, out=buffers("values", len(pairs), s.block_k * E))
                values = values.view(r, -1, E)
                grad_rqK = torch.bmm(rows_g, values.mT, out=buffers("grad_scores", *weight_rqK.shape))
                torch.bmm(weight_rqK.mT, rows_g, out=values)
                grad_v_R.index_add_(0, pairs, values.view(len(pairs), -1))

                grad_rqK.sub_(shift_rq[..., None]).mul_(weight_rqK)
                if grad_bias is not None:
                    tiles = grad_rqK.view(r, s.block_q, piece.width, s.block_k)
                    where = work.map_P[piece.pair : piece.pair + len(pairs)]
                    grad_bias.view(-1)[where] = tiles.sum((1, 3)).view(-1)
                keys = buffers("keys", r, piece.width * s.block_k, D)
                rows_d = buffers("grad_queries", r, s.block_q, D)
                torch.baddbmm(rows_d, grad_rqK, keys, beta=0, alpha=job.scale, out=rows_d)
                grad_q_R.index_add_(0, rows, rows_d.view(r, -1))
                torch.baddbmm(keys, grad_rqK.mT, rows_q, beta=0, alpha=job.scale, out=keys)
                grad_k_R.index_add_(0, pairs, keys.view(len(pairs), -1))
        return (
            _from_blocks(grad_q_R, q.shape),
            _from_blocks(grad_k_R, k.shape),
            _from_blocks(grad_v_R, v.shape),
            grad_bias,
            None,
        )


def _buffers(q: Tensor, v: Tensor, s: BlockStructure, pieces: list[Piece], backward: bool) -> _Buffers:
    D, E = q.shape[3], v.shape[3]
    rows = max((piece.rows for piece in pieces), default=0) * s.block_q
    pairs = max((piece.rows * piece.width for piece in pieces), default=0) * s.block_k
    sizes = {"queries": rows * D, "rows": rows * E, "scores": pairs * s.block_q}
    if backward:
        sizes |= {"keys": pairs * D, "values": pairs * E, "grad_scores": pairs * s.block_q}
        sizes |= {"grads": rows * E, "grad_queries": rows * D}
    else:
        sizes |= {"keys": pairs * max(D, E)}
    return _Buffers(q, **sizes)


def _scores(
    q_R: Tensor,
    k_R: Tensor,
    bias: Tensor | None,
    job: _Job,
    work: WorkList,
    piece: Piece,
    buffers: _Buffers,
) -> Tensor:
    """Scores (r, block_q, c * block_k) of a piece, FORBIDDEN where the mask says no; leaves queries and keys in place."""
    s, rows, pairs = job.structure, work.rows(piece), work.pairs(piece)
    queries = torch.index_select(q_R, 0, rows, out=buffers("queries", piece.rows, q_R.shape[1]))
    keys = torch.index_select(k_R, 0, pairs, out=buffers("keys", len(pairs), k_R.shape[1]))
    D = q_R.shape[1] // s.block_q
    scores = buffers("scores", piece.rows, s.block_q, piece.width * s.block_k)
    queries, keys = queries.view(piece.rows, -1, D), keys.view(piece.rows, -1, D)
    torch.baddbmm(scores, queries, keys.mT, beta=0, alpha=job.scale, out=scores)
    if bias is not None or piece.has_partial:
        tiles = scores.view(piece.rows, s.block_q, piece.width, s.block_k)
        if bias is not None:
            where = work.map_P[piece.pair : piece.pair + len(pairs)]
            tiles += bias.reshape(-1)[where].view(piece.rows, 1, piece.width, 1)
        if piece.has_partial:
            s.forbid(work, piece, tiles, FORBIDDEN)
    return scores


def _softmax(score_rqK: Tensor, wants_lse: bool, may_be_dead: bool) -> tuple[Tensor | None, Tensor | None]:
    """Turn scores into weights in place; their LSE, and which rows may attend to nothing (their weights mean nothing)."""
    if not wants_lse:
        torch.softmax(score_rqK, -1, out=score_rqK)
        return None, None
    top_rq = score_rqK.amax(-1)
    torch.softmax(score_rqK, -1, out=score_rqK)
    # the largest weight is exp(largest score - lse)
    lse_rq = top_rq - score_rqK.amax(-1).log_()
    if not may_be_dead:
        return lse_rq, None
    dead_rq = top_rq <= FORBIDDEN / 2
    return lse_rq.masked_fill_(dead_rq, float("-inf")), dead_rq
