"""Attention inside the non-overlapping windows of a grid of tokens, which may be shifted (Swin), exactly.

Shape letters: B batch, H query heads, K key heads, G = H / K, N tokens, D head dim of q and k, E of v; W windows of
the batch, T rows of a window (tokens x G), L keys of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["relative_bias", "window_attend"]

#: bytes of scores per thread that stay in a CPU's second-level cache
_PIECE_BYTES = 2 * 2**20


def window_attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    size: int | Sequence[int],
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    memory_mb: float = 64.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention inside the windows of a grid of tokens, which are moved by `shift` (Swin's shifted windows).

        out_i = sum_j softmax_j(scale q_i . k_j + bias[h, i mod window, j mod window]) v_j,   j in the window of i

    The grid is shifted cyclically, and tokens that only meet because of that do not see each other; where the window
    does not divide the grid, the windows at its end are smaller. On an axis that is no longer than the window there
    is one window and no shift.

    Args:
        q_BHND, k_BKND, v_BKNE: tokens in row-major order of the grid; K divides H.
        size: the grid, an int or a tuple of up to three.
        window: tokens per window, per axis; T = prod(window).
        shift: 0 <= shift < window, per axis; window i starts at i * window + shift.
        bias: (H, T, T) or (1, T, T), added to the scores; see `relative_bias`. Gradients reach it.
        scale: D ** -0.5 where None.
        return_lse: also return the log of the sum of the exponentials (B, H, N).
        memory_mb: bound of the scores held at a time, in MiB.

    Raises:
        ValueError: if shapes do not fit.
    """
    grid = (size,) if isinstance(size, int) else tuple(size)
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"size must be one to three positive lengths, got {size}")
    windows = (window,) * len(grid) if isinstance(window, int) else tuple(window)
    shifts = (shift,) * len(grid) if isinstance(shift, int) else tuple(shift)
    if len(windows) != len(grid) or len(shifts) != len(grid):
        raise ValueError(f"window and shift must have one entry per axis ({len(grid)}), got {window} and {shift}")
    for w, s in zip(windows, shifts):
        if w < 1 or not 0 <= s < w:
            raise ValueError(f"shift must be at least 0 and below the window, got {s} and {w}")
    for name, x in (("query", q_BHND), ("key", k_BKND), ("value", v_BKNE)):
        if x.ndim != 4 or x.shape[2] != prod(grid):
            raise ValueError(
                f"{name} must be (batch, heads, {prod(grid)} tokens, head_dim) for a grid of {grid}, "
                f"got shape {tuple(x.shape)}"
            )
    B, H, N, D = q_BHND.shape
    K = k_BKND.shape[1]
    if k_BKND.shape != (B, K, N, D) or v_BKNE.shape[:3] != (B, K, N) or K == 0 or H % K:
        raise ValueError(
            "query, key and value must agree in batch and head_dim, and the key heads must divide the query heads, "
            f"got {tuple(q_BHND.shape)}, {tuple(k_BKND.shape)} and {tuple(v_BKNE.shape)}"
        )
    G, T = H // K, prod(windows)
    if bias is not None:
        if bias.shape not in ((H, T, T), (1, T, T)):
            raise ValueError(f"bias must be ({H} or 1, {T}, {T}), got shape {tuple(bias.shape)}")
        bias = bias.expand(H, T, T).reshape(K, G * T, T)
    shifts = tuple(0 if n <= w else s for n, w, s in zip(grid, windows, shifts))
    kinds, forbidden = _regions(grid, windows, shifts)
    q = _partition(q_BHND, grid, windows, shifts).unflatten(2, (K, G)).flatten(3, 4)
    k, v = (_partition(x, grid, windows, shifts) for x in (k_BKND, v_BKNE))
    out, lse = _partition_forward(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        bias,
        forbidden.repeat(1, G, 1).to(q.device),
        kinds * B,
        D**-0.5 if scale is None else float(scale),
        return_lse,
        memory_mb,
    )
    out = _join(out.view(B, -1, H, T, v.shape[-1]), grid, windows, shifts)
    if not return_lse:
        return out
    return out, _join(lse.view(B, -1, H, T, 1), grid, windows, shifts)[..., 0]


def relative_bias(table: Tensor, window: int | Sequence[int]) -> Tensor:
    """The bias (H, T, T) of a table of relative positions.

    Args:
        table: (H, 2 w_1 - 1, ..., 2 w_d - 1), at index key - query + w - 1 on every axis.
        window: (w_1, ..., w_d).

    Raises:
        ValueError: if the table's shape does not fit the window.
    """
    windows = (window,) if isinstance(window, int) else tuple(window)
    if tuple(table.shape[1:]) != tuple(2 * w - 1 for w in windows):
        raise ValueError(
            f"table must be (heads, {', '.join(str(2 * w - 1) for w in windows)}) for a window of {windows}, "
            f"got shape {tuple(table.shape)}"
        )
    axes = len(windows)
    index: list[Tensor] = []
    for axis, w in enumerate(windows):
        i = torch.arange(w, device=table.device)
        shape = [1] * (2 * axes)
        shape[axis] = shape[axes + axis] = w
        index.append((i - i[:, None] + w - 1).view(shape))
    return table.movedim(0, -1)[tuple(index)].movedim(-1, 0).reshape(table.shape[0], prod(windows), prod(windows))


@lru_cache(maxsize=32)
def _regions(grid: tuple[int, ...], windows: tuple[int, ...], shifts: tuple[int, ...]) -> tuple[list[int], Tensor]:
    """Kind of each window, and the pairs forbidden in each kind (kinds, T, T); kind 0 forbids nothing."""
    allowed = torch.ones(1, 1, 1, dtype=torch.bool)
    for n, w, s in zip(grid, windows, shifts):
        padded = -(-n // w) * w
        place = (torch.arange(padded) + s) % padded  # before the cyclic shift
        # what was moved from the front to the end is a region of its own, the padding is seen by nobody
        region = torch.where(place < n, (place < s).long(), -1).view(-1, w)
        axis = (region[:, :, None] == region[:, None]) & (region[:, None] >= 0) | (region[:, :, None] < 0)
        a, b = allowed.shape[0], allowed.shape[1]
        allowed = allowed[:, None, :, None, :, None] & axis[None, :, None, :, None, :]
        allowed = allowed.reshape(a * axis.shape[0], b * w, b * w)
    plain = torch.ones(1, *allowed.shape[1:], dtype=torch.bool)
    # counted from the plain window, so that it is kind 0
    distinct, kinds = torch.unique(torch.cat([~plain, ~allowed]), dim=0, return_inverse=True)
    return kinds[1:].tolist(), distinct


def _partition(x: Tensor, grid: Sequence[int], windows: Sequence[int], shifts: Sequence[int]) -> Tensor:
    """(B, H, N, X) in windows (B, P, H, T, X)."""
    axes = len(grid)
    x = x.unflatten(2, tuple(grid))
    pad = [-n % w for n, w in zip(grid, windows)]
    if any(pad):
        x = F.pad(x, (0, 0, *(side for p in reversed(pad) for side in (0, p))))
    if any(shifts):
        x = x.roll([-s for s in shifts], list(range(2, 2 + axes)))
    for axis, w in reversed(list(enumerate(windows))):
        x = x.unflatten(2 + axis, (-1, w))
    outer, inner = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    x = x.permute(0, *outer, 1, *inner, 2 + 2 * axes)
    return x.flatten(2 + axes, 1 + 2 * axes).flatten(1, axes)


def _join(x: Tensor, grid: Sequence[int], windows: Sequence[int], shifts: Sequence[int]) -> Tensor:
    """Windows (B, P, H, T, X) as tokens (B, H, N, X)."""
    axes = len(grid)
    counts = [-(-n // w) for n, w in zip(grid, windows)]
    x = x.unflatten(3, tuple(windows)).unflatten(1, counts)  # B, counts, H, windows, X
    order = [i for axis in range(axes) for i in (1 + axis, 2 + axes + axis)]
    x = x.permute(0, 1 + axes, *order, 2 + 2 * axes)
    for axis in range(axes):
        x = x.flatten(2 + axis, 3 + axis)
    if any(shifts):
        x = x.roll(list(shifts), list(range(2, 2 + axes)))
    for axis, n in enumerate(grid):
        x = x.narrow(2 + axis, 0, n)
    return x.flatten(2, 1 + axes)


def _window_pieces(W: int, K: int, T: int, L: int, itemsize: int, limit: int) -> Iterator[tuple[int, int]]:
    step = max(1, limit // (K * T * L * itemsize))
    yield from ((a, min(a + step, W)) for a in range(0, W, step))


def _window_biases(bias: Tensor | None, forbidden: Tensor, K: int, like: Tensor) -> Tensor:
    """Bias of each kind of window (kinds, K T L): the heads' own, and -inf where the region forbids."""
    plain = like.new_zeros(K, *forbidden.shape[1:]) if bias is None else bias
    return plain.masked_fill(forbidden[:, None], float("-inf")).flatten(1)


def _window_bias(biases: Tensor, kinds: Tensor, K: int, T: int, L: int, scratch: _Scratch) -> Tensor:
    """Bias of some windows (c K, T, L)."""
    piece = scratch.take("bias", kinds.numel(), K * T * L)
    torch.index_select(biases, 0, kinds, out=piece)
    return piece.view(-1, T, L)


@torch.library.custom_op("saccade::partition_attend", mutates_args=())
def _partition_forward(
    q_WKTD: Tensor,
    k_WKLD: Tensor,
    v_WKLE: Tensor,
    bias_KTL: Tensor | None,
    forbidden: Tensor,
    kinds: list[int],
    scale: float,
    return_lse: bool,
    memory_mb: float,
) -> tuple[Tensor, Tensor]:
    W, K, T, _ = q_WKTD.shape
    L, E = v_WKLE.shape[2:]
    dtype = _working_dtype(q_WKTD.dtype)
    out = torch.empty(W * K, T, E, dtype=dtype, device=q_WKTD.device)
    lse = torch.empty((W * K, T) if return_lse else (0,), dtype=dtype, device=q_WKTD.device)
    q, k, v = (x.to(dtype).contiguous().flatten(0, 1) for x in (q_WKTD, k_WKLD, v_WKLE))
    biases = _window_biases(None if bias_KTL is None else bias_KTL.to(dtype), forbidden, K, out)
    kinds_W, scratch = torch.tensor(kinds, device=out.device), _Scratch(out)
    for a, b in _window_pieces(W, K, T, L, out.element_size(), _piece_bytes(memory_mb) // 2):
        piece = slice(a * K, b * K)
        _piece_forward(
            q[piece],
            k[piece],
            v[piece],
            _window_bias(biases, kinds_W[a:b], K, T, L, scratch),
            scale,
            scratch,
            out[piece],
            lse[piece] if return_lse else None,
        )
    return out.view(W, K, T, E).to(q_WKTD.dtype), lse.view(W, K, T) if return_lse else lse


@_partition_forward.register_fake
def _(
    q_WKTD: Tensor,
    k_WKLD: Tensor,
    v_WKLE: Tensor,
    bias_KTL: Tensor | None,
    forbidden: Tensor,
    kinds: list[int],
    scale: float,
    return_lse: bool,
    memory_mb: float,
) -> Any:
    lse = q_WKTD.new_empty(q_WKTD.shape[:3] if return_lse else (0,), dtype=_working_dtype(q_WKTD.dtype))
    return q_WKTD.new_empty(*q_WKTD.shape[:3], v_WKLE.shape[3]), lse


@torch.library.custom_op("saccade::partition_attend_backward", mutates_args=())
def _partition_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q_WKTD: Tensor,
    k_WKLD: Tensor,
    v_WKLE: Tensor,
    bias_KTL: Tensor | None,
    out: Tensor,
    forbidden: Tensor,
    kinds: list[int],
    scale: float,
    memory_mb: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    W, K, T, _ = q_WKTD.shape
    L = k_WKLD.shape[2]
    dtype = _working_dtype(q_WKTD.dtype)
    q, k, v, go, o = (x.to(dtype).contiguous().flatten(0, 1) for x in (q_WKTD, k_WKLD, v_WKLE, grad_out, out))
    biases = _window_biases(None if bias_KTL is None else bias_KTL.to(dtype), forbidden, K, q)
    delta = -(go * o).sum(-1, keepdim=True)
    if grad_lse is not None:
        delta = delta + grad_lse.flatten(0, 1)[..., None]
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    grad_bias = torch.zeros((0,) if bias_KTL is None else (K, T, L), dtype=dtype, device=q.device)
    kinds_W, scratch = torch.tensor(kinds, device=q.device), _Scratch(q)
    for a, b in _window_pieces(W, K, T, L, q.element_size(), _piece_bytes(memory_mb) // 3):
        piece = slice(a * K, b * K)
        bias_piece = _window_bias(biases, kinds_W[a:b], K, T, L, scratch)
        boxes_k, boxes_v, grad_scores = _piece_backward(
            q[piece], k[piece], v[piece], bias_piece, scale, scratch, go[piece], delta[piece], grad_q[piece]
        )
        grad_k[piece], grad_v[piece] = boxes_k, boxes_v
        if bias_KTL is not None:
            grad_bias += grad_scores.view(b - a, K, T, L).sum(0)
    grads = (x.view(like.shape).to(like.dtype) for x, like in zip((grad_q, grad_k, grad_v), (q_WKTD, k_WKLD, v_WKLE)))
    grad_q, grad_k, grad_v = grads
    return grad_q, grad_k, grad_v, grad_bias if bias_KTL is None else grad_bias.to(bias_KTL.dtype)


@_partition_backward.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q_WKTD: Tensor,
    k_WKLD: Tensor,
    v_WKLE: Tensor,
    bias_KTL: Tensor | None,
    out: Tensor,
    forbidden: Tensor,
    kinds: list[int],
    scale: float,
    memory_mb: float,
) -> Any:
    grad_bias = q_WKTD.new_empty(0) if bias_KTL is None else bias_KTL.new_empty(bias_KTL.shape)
    grads = (x.new_empty(x.shape) for x in (q_WKTD, k_WKLD, v_WKLE))
    return (*grads, grad_bias)


def _setup_partition(ctx: Any, inputs: Any, output: Any) -> None:
    q, k, v, bias, forbidden, ctx.kinds, ctx.scale, ctx.return_lse, ctx.memory_mb = inputs
    ctx.save_for_backward(q, k, v, bias, output[0], forbidden)


def _differentiate_partition(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> Any:
    q, k, v, bias, out, forbidden = ctx.saved_tensors
    *grads, grad_bias = _partition_backward(
        grad_out,
        grad_lse if ctx.return_lse else None,
        q,
        k,
        v,
        bias,
        out,
        forbidden,
        ctx.kinds,
        ctx.scale,
        ctx.memory_mb,
    )
    return (*grads, None if bias is None else grad_bias, None, None, None, None, None)


_partition_forward.register_autograd(_differentiate_partition, setup_context=_setup_partition)


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and sums are kept in single precision at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _piece_bytes(memory_mb: float) -> int:
    return int(min(_PIECE_BYTES * torch.get_num_threads(), memory_mb * 2**20 / 3))


class _Scratch:
    """Buffers that are used again from piece to piece."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.buffers: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int) -> Tensor:
        need = prod(shape)
        buffer = self.buffers.get(name)
        if buffer is None or buffer.numel() < need:
            self.buffers[name] = buffer = self.like.new_empty(need)
        return buffer[:need].view(shape)


def _probabilities(q: Tensor, k: Tensor, bias: Tensor, scale: float, scratch: _Scratch, lse: Tensor | None) -> Tensor:
    """softmax(scale q k^T + bias), (c, T, L); its log-sum-exp is written to `lse` (c, T) where given."""
    scores = scratch.take("scores", q.shape[0], q.shape[1], k.shape[1])
    torch.baddbmm(bias.expand_as(scores), q, k.mT, alpha=scale, out=scores)
    if lse is None:
        return torch.softmax(scores, -1, out=scores)
    top = scores.amax(-1)
    torch.softmax(scores, -1, out=scores)
    # the largest weight is exp(top - lse)
    torch.sub(top, scores.amax(-1).log_(), out=lse)
    return scores


def _piece_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    scratch: _Scratch,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    torch.bmm(_probabilities(q, k, bias, scale, scratch, lse), v, out=out)


def _piece_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    scale: float,
    scratch: _Scratch,
    grad_out: Tensor,
    delta: Tensor,
    grad_q: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes dQ; returns dK and dV of the boxes and dS. `delta` is rowsum(dO * O) - dlse, (c, T, 1), negated."""
    weights = _probabilities(q, k, bias, scale, scratch, None)
    grad_v = scratch.take("grad_v", *v.shape)
    torch.bmm(weights.mT, grad_out, out=grad_v)
    grad_scores = scratch.take("grad_scores", *weights.shape)
    torch.baddbmm(delta.expand_as(grad_scores), grad_out, v.mT, out=grad_scores)
    grad_scores.mul_(weights)
    torch.baddbmm(grad_q, grad_scores, k, beta=0, alpha=scale, out=grad_q)
    grad_k = scratch.take("grad_k", *k.shape)
    torch.baddbmm(grad_k, grad_scores.mT, q, beta=0, alpha=scale, out=grad_k)
    return grad_k, grad_v, grad_scores
