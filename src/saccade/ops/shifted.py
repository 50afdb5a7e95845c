"""Attention inside the non-overlapping windows of a grid of tokens, which may be shifted (Swin), exactly.

    S = scale * Q K^T + bias,   P = exp2(S log2 e - lse),   O = P V
    dV = P^T dO,   dS = P * (dO V^T - rowsum(dO * O) + dlse),   dQ = scale * dS K,   dK = scale * dS^T Q
    dbias = sum of dS over windows

Cyclic shift and region mask are only a way to write down that the windows at the border are cut in two. Here they are
cut: on each axis the grid falls into a first part, whole windows, and a rest, so the whole grid falls into at most 3^d
kinds of equal boxes. Nothing is rolled, padded or masked, and a part of a window costs what its own pairs cost.

What makes it fast: windows are taken in pieces whose scores stay in the cache, a strided copy brings a piece from any
layout of tokens and heads to (window, head, row); bias and scale ride along with the product; the weights are powers of
two of scores without their maximum (rows whose sum leaves the safe range are computed again, with it), and the output
is divided instead of the weights. The backward pass computes the weights again: nothing of T x T is kept. On a CPU the
buffers of a piece (some 10 MB a thread that calls) stay from call to call: the first touch of a page of new memory
costs more than the arithmetic on it.

Shape letters: B batch, H query heads, K key heads, G = H / K, N tokens, D head dim of q and k, E of v, P masks;
c windows of a piece, T tokens of a window, R = G T rows of a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from saccade.ops.export import exporting, weigh
from saccade.ops.grad import first_derivatives_only
from saccade.ops.heads import repeat_heads
from saccade.ops.scratch import Scratch, scratch

__all__ = ["packed_window_attend", "relative_bias", "window_attend"]

#: bytes of scores per thread and piece: larger ones leave the cache, smaller ones pay for more calls
_PIECE_BYTES = 2**20

_LOG2_E = 1.4426950408889634

#: sums of exp2(scores) in which neither the weights nor their products with values leave the range of floats
_SAFE_SUMS = (2.0**-90, 2.0**80)


def window_attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    size: int | Sequence[int],
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    memory_mb: float = 64.0,
) -> Any:
    """Attention inside the windows of a grid of tokens, which are moved by `shift` (Swin's shifted windows).

        out_i = sum_j softmax_j(scale q_i . k_j + bias[h, i mod window, j mod window]) v_j,   j in the window of i

    Tokens that a cyclic shift would bring together do not see each other; where the window does not divide the grid,
    the windows at its end are smaller. On an axis that is no longer than the window there is one window and no shift.

    Args:
        q_BHND, k_BKND, v_BKNE: tokens in row-major order of the grid, in any layout; K divides H.
        size: the grid, an int or a tuple of up to three.
        window: tokens per window, per axis; T = prod(window).
        shift: 0 <= shift < window, per axis; window i starts at i * window + shift.
        bias: (H, T, T) or (1, T, T), added to the scores; see `relative_bias`. Gradients reach it.
        mask: (P, T, T), added to the scores of all heads where the grid is one window; row b of the batch takes mask
            b mod P. No gradient.
        scale: D ** -0.5 where None.
        return_lse: also return the log of the sum of the exponentials (B, H, N).
        memory_mb: bound of the scores held at a time, in MiB; at least those of one window and head are.

    Returns:
        (B, H, N, E); a row that may attend to nothing gives zeros.

    Raises:
        ValueError: if shapes do not fit.
    """
    grid, windows, shifts = _grid(size, window, shift)
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
    bias = _check_bias(bias, mask, H, grid, windows)
    scale = D**-0.5 if scale is None else float(scale)
    spec = (*grid, *windows, *shifts)
    if exporting():
        out, lse = _in_plain_torch(q_BHND, k_BKND, v_BKNE, bias, mask, spec, scale)
    else:
        out, lse = _forward([q_BHND, k_BKND, v_BKNE], bias, mask, list(spec), scale, memory_mb)
    return (out, lse) if return_lse else out


def packed_window_attend(
    qkv_BN3HD: Tensor,
    size: int | Sequence[int],
    window: int | Sequence[int],
    shift: int | Sequence[int] = 0,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    memory_mb: float = 64.0,
) -> Tensor:
    """`window_attend` of queries, keys and values that lie side by side, as one projection gives them.

    Returns:
        (B, H, N, D), in memory (B, N, H, D), so that merging the heads copies nothing. The gradient of `qkv_BN3HD` is
        written in place, without the stacking of three.

    Raises:
        ValueError: if shapes do not fit.
    """
    grid, windows, shifts = _grid(size, window, shift)
    if qkv_BN3HD.ndim != 5 or qkv_BN3HD.shape[1] != prod(grid) or qkv_BN3HD.shape[2] != 3:
        raise ValueError(
            f"qkv must be (batch, {prod(grid)} tokens, 3, heads, head_dim) for a grid of {grid}, "
            f"got shape {tuple(qkv_BN3HD.shape)}"
        )
    H, D = qkv_BN3HD.shape[3:]
    bias = _check_bias(bias, mask, H, grid, windows)
    scale = D**-0.5 if scale is None else float(scale)
    spec = (*grid, *windows, *shifts)
    if exporting():
        q, k, v = _unpack([qkv_BN3HD])
        return _in_plain_torch(q, k, v, bias, mask, spec, scale)[0]
    return _forward([qkv_BN3HD], bias, mask, list(spec), scale, memory_mb)[0]


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


def _grid(
    size: int | Sequence[int], window: int | Sequence[int], shift: int | Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
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
    return grid, windows, shifts


def _check_bias(
    bias: Tensor | None, mask: Tensor | None, H: int, grid: tuple[int, ...], windows: tuple[int, ...]
) -> Tensor | None:
    T = prod(windows)
    if bias is not None and bias.shape not in ((H, T, T), (1, T, T)):
        raise ValueError(f"bias must be ({H} or 1, {T}, {T}), got shape {tuple(bias.shape)}")
    if mask is not None:
        if grid != windows:
            raise ValueError(f"mask is for a grid of one window ({windows}), got a grid of {grid}")
        if mask.ndim != 3 or mask.shape[1:] != (T, T) or not mask.shape[0] or not mask.is_floating_point():
            raise ValueError(f"mask must be (masks, {T}, {T}) of numbers to add, got {mask.dtype} {tuple(mask.shape)}")
    return None if bias is None else bias.expand(H, T, T)


# ---------------------------------------------------------------------------- the boxes


@dataclass(frozen=True)
class _Segment:
    """Equal parts of windows on one axis."""

    start: int  #: first token
    count: int
    length: int  #: tokens of each
    inside: int  #: place of its first token in the window


def _segments(n: int, window: int, shift: int) -> list[_Segment]:
    if n <= window:
        return [_Segment(0, 1, n, 0)]
    whole, rest = divmod(n - shift, window)
    parts = [
        _Segment(0, 1, shift, window - shift),
        _Segment(shift, whole, window, 0),
        _Segment(n - rest, 1, rest, 0),
    ]
    return [part for part in parts if part.count and part.length]


@dataclass(frozen=True)
class _Boxes:
    """The boxes of one kind: a segment of each axis."""

    grid: tuple[int, ...]
    windows: tuple[int, ...]
    segments: tuple[_Segment, ...]

    @property
    def tokens(self) -> int:
        return prod(s.length for s in self.segments)

    def view(self, x_BXNY: Tensor) -> Tensor:
        """(B, n_1 .. n_d, X, l_1 .. l_d, Y): the boxes' tokens, a view."""
        x, d = x_BXNY.unflatten(2, self.grid), len(self.grid)
        for axis, s in enumerate(self.segments):
            x = x.narrow(2 + 2 * axis, s.start, s.count * s.length).unflatten(2 + 2 * axis, (s.count, s.length))
        return x.permute(0, *range(2, 2 + 2 * d, 2), 1, *range(3, 3 + 2 * d, 2), 2 + 2 * d)

    def pairs(self, bias_HTT: Tensor) -> Tensor:
        """(H, l_1 .. l_d, l_1 .. l_d) of a bias, a view."""
        x, d = bias_HTT.unflatten(2, self.windows).unflatten(1, self.windows), len(self.grid)
        for axis, s in enumerate(self.segments):
            x = x.narrow(1 + axis, s.inside, s.length).narrow(1 + d + axis, s.inside, s.length)
        return x


@lru_cache(maxsize=64)
def _kinds(spec: tuple[int, ...]) -> tuple[_Boxes, ...]:
    d = len(spec) // 3
    grid, windows, shifts = spec[:d], spec[d : 2 * d], spec[2 * d :]
    axes = [_segments(n, w, s) for n, w, s in zip(grid, windows, shifts)]
    return tuple(_Boxes(grid, windows, segments) for segments in product(*axes))


def _in_plain_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_HTT: Tensor | None,
    mask_PTT: Tensor | None,
    spec: tuple[int, ...],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output and LSE in operators that every exporter knows: each kind of box as one batch, then side by side."""
    (B, H), d = q.shape[:2], len(spec) // 3
    k, v = (repeat_heads(x, H) for x in (k, v))
    parts = []
    for boxes in _kinds(spec):
        counts, lengths = ([getattr(s, name) for s in boxes.segments] for name in ("count", "length"))
        T, n = boxes.tokens, prod(counts)
        q_, k_, v_ = (boxes.view(x).reshape(B * n, H, T, x.shape[3]) for x in (q, k, v))
        scores = (q_ * scale) @ k_.mT
        if bias_HTT is not None:
            scores = scores + boxes.pairs(bias_HTT).reshape(H, T, T)
        if mask_PTT is not None:
            scores = scores + mask_PTT[torch.arange(B, device=q.device) % mask_PTT.shape[0]][:, None]
        out, lse = weigh(scores, v_)
        both = torch.cat([out, lse[..., None]], -1).view(B, *counts, H, *lengths, -1)
        axes = [axis for pair in zip(range(1, 1 + d), range(2 + d, 2 + 2 * d)) for axis in pair]
        both = both.permute(0, 1 + d, *axes, 2 + 2 * d)
        parts.append(both.reshape(B, H, *(c * l for c, l in zip(counts, lengths)), -1))
    for axis in reversed(range(d)):
        number = len({boxes.segments[axis].start for boxes in _kinds(spec)})
        parts = [torch.cat(parts[i : i + number], 2 + axis) for i in range(0, len(parts), number)]
    out, lse = parts[0].flatten(2, 1 + d).split([v.shape[3], 1], -1)
    return out, lse[..., 0]


def _slices(counts: Sequence[int], most: int) -> Iterator[tuple[slice, ...]]:
    """Cuts of axes of `counts` in which there are at most `most` items (but one at least)."""
    cuts: list[list[slice]] = []
    for count in reversed(counts):
        step = max(1, min(count, most))
        most //= step
        cuts.insert(0, [slice(a, min(a + step, count)) for a in range(0, count, step)])
    yield from product(*cuts)


# ---------------------------------------------------------------------------- pieces


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores and sums are kept in single precision at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _loaded(room: Scratch, name: str, x: Tensor, *shape: int) -> Tensor:
    """`x` in one block of memory, itself where it is."""
    if x.dtype == room.dtype and x.is_contiguous():
        return x.view(shape)
    return room(name, *x.shape).copy_(x).view(shape)


def _target(room: Scratch, name: str, x: Tensor, *shape: int) -> Tensor:
    """Where to write what belongs to `x`: `x` itself where it is one block."""
    return x.view(shape) if x.dtype == room.dtype and x.is_contiguous() else room(name, *shape)


def _store(x: Tensor, written: Tensor) -> None:
    if written.data_ptr() != x.data_ptr():
        x.copy_(written.view(x.shape))


class _Call:
    """What all pieces of a call share: the addends of the scores, in powers of two, and how large a piece may be."""

    def __init__(
        self, q: Tensor, bias: Tensor | None, mask: Tensor | None, spec: list[int], scale: float, memory: float
    ) -> None:
        dtype, self.scale = _working_dtype(q.dtype), scale
        self.kinds = _kinds(tuple(spec))
        self.bias, self.mask = (None if x is None else x.to(dtype) * _LOG2_E for x in (bias, mask))
        cache = _PIECE_BYTES * torch.get_num_threads() if q.device.type == "cpu" else memory
        self.limit = int(min(cache, memory))

    def cuts(self, boxes: _Boxes, B: int, K: int, G: int) -> Iterator[tuple[slice, ...]]:
        """Slices of batch, windows per axis, and key heads, whose scores fit into the limit."""
        return _slices([B, *(s.count for s in boxes.segments), K], self.limit // (4 * G * boxes.tokens**2))

    def bias_of(self, boxes: _Boxes, G: int) -> Tensor | None:
        """(K, G, T, T)."""
        T = boxes.tokens
        return None if self.bias is None else boxes.pairs(self.bias).reshape(-1, G, T, T)

    def score(
        self,
        scores_nRT: Tensor,
        q_nRD: Tensor,
        k_nTD: Tensor,
        bias_KGTT: Tensor | None,
        cut: tuple[slice, ...],
        minus: Tensor | None = None,
    ) -> None:
        """Writes scale * q k^T + bias + mask - minus, in powers of two."""
        T, heads = k_nTD.shape[1], cut[-1]
        addends = [] if bias_KGTT is None else [bias_KGTT[heads]]
        if self.mask is not None:
            rows = torch.arange(cut[0].start, cut[0].stop, device=self.mask.device) % self.mask.shape[0]
            addends.append(self.mask[rows][:, None, None])
        if minus is not None:
            addends.append(minus.neg())
        split = scores_nRT.view(-1, heads.stop - heads.start, q_nRD.shape[1] // T, T, T)
        if len(addends) == 1:
            split.copy_(addends[0])
        elif addends:
            torch.add(addends[0], addends[1], out=split)
            for addend in addends[2:]:
                split.add_(addend)
        scores_nRT.baddbmm_(q_nRD, k_nTD.mT, beta=min(1, len(addends)), alpha=self.scale * _LOG2_E)


def _part(view: Tensor, cut: tuple[slice, ...], G: int = 1) -> Tensor:
    """A piece of a view of boxes; G heads for each of the cut's."""
    *windows, heads = cut
    return view[(*windows, heads if G == 1 else slice(heads.start * G, heads.stop * G))]


def _unpack(tensors: list[Tensor]) -> list[Tensor]:
    """Views (B, H, N, D) of query, key and value."""
    return [x.transpose(1, 2) for x in tensors[0].unbind(2)] if len(tensors) == 1 else tensors


# ---------------------------------------------------------------------------- the operator


def _empty_out(v: Tensor, H: int) -> Tensor:
    """The output, tokens and heads in memory as in the values."""
    return torch.empty_like(v) if v.shape[1] == H else v.new_empty(v.shape[0], H, *v.shape[2:])


@torch.library.custom_op("saccade::shifted_attend", mutates_args=())
def _forward(
    tensors: list[Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = _unpack(tensors)
    (B, H, N, D), K, E = q.shape, k.shape[1], v.shape[3]
    G, dtype = H // K, _working_dtype(q.dtype)
    out = _empty_out(v, H)
    lse = torch.empty(B, H, N, dtype=dtype, device=q.device)
    call = _Call(q, bias, mask, spec, scale, memory_mb * 2**20 / 3)
    safe = q.device.type == "cpu"  # elsewhere a look at the sums would wait for the device
    with scratch("shifted", dtype, q.device) as room:
        for boxes in call.kinds:
            T, bias_KGTT = boxes.tokens, call.bias_of(boxes, G)
            q_boxes, k_boxes, v_boxes, out_boxes, lse_boxes = (boxes.view(x) for x in (q, k, v, out, lse[..., None]))
            for cut in call.cuts(boxes, B, K, G):
                n = prod(s.stop - s.start for s in cut)  # windows and key heads of the piece
                k_piece = _loaded(room, "k", _part(k_boxes, cut), n, T, D)
                q_piece = _loaded(room, "q", _part(q_boxes, cut, G), n, G * T, D)
                v_piece = _loaded(room, "v", _part(v_boxes, cut), n, T, E)
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
                lse_view, out_view = _part(lse_boxes, cut, G), _part(out_boxes, cut, G)
                logs = sums.log2() if top is None else sums.log2().add_(top)
                torch.mul(logs.view(lse_view.shape), 1 / _LOG2_E, out=lse_view)
                if top is not None:
                    sums.masked_fill_(sums == 0, 1.0)
                weighted = torch.bmm(weights, v_piece, out=room("out", n, G * T, E))
                torch.mul(weighted.view(out_view.shape), sums.reciprocal_().view(lse_view.shape), out=out_view)
    return out, lse


@_forward.register_fake
def _(
    tensors: list[Tensor],
    bias: Tensor | None,
    mask: Tensor | None,
    spec: list[int],
    scale: float,
    memory_mb: float,
) -> Any:
    q, _, v = _unpack(tensors)
    return _empty_out(v, q.shape[1]), q.new_empty(q.shape[:3], dtype=_working_dtype(q.dtype))


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
    q, k, v = _unpack(tensors)
    B, H, _, D = q.shape
    K, E = k.shape[1], v.shape[3]
    G, dtype = H // K, _working_dtype(q.dtype)
    grads = [torch.empty_like(x) for x in tensors]
    grad_q, grad_k, grad_v = _unpack(grads)
    grad_bias = torch.zeros((0,) if bias is None else bias.shape, dtype=dtype, device=q.device)
    shift = lse.masked_fill(lse == float("-inf"), 0.0).mul_(_LOG2_E)[..., None]
    call = _Call(q, bias, mask, spec, scale, memory_mb * 2**20 / 6)
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
                k_view, q_view, go_view = _part(k_boxes, cut), _part(q_boxes, cut, G), _part(go_boxes, cut, G)
                k_piece = _loaded(room, "k", k_view, n, T, D)
                q_piece = _loaded(room, "q", q_view, n, G * T, D)
                v_piece = _loaded(room, "v", _part(v_boxes, cut), n, T, E)
                go = _loaded(room, "grad_out", go_view, n, G * T, E)

                scores = room("scores", n, G * T, T)
                minus = _part(shift_boxes, cut, G).reshape(-1, heads, G, T, 1)
                call.score(scores, q_piece, k_piece, bias_KGTT, cut, minus)
                weights = scores.exp2_()

                gv_view = _part(gv_boxes, cut)
                gv = _target(room, "grad_k", gv_view, n, T, E)
                _store(gv_view, torch.bmm(weights.mT, go, out=gv))

                both = room("product", *go_view.shape)
                delta = torch.mul(go.view(go_view.shape), _part(out_boxes, cut, G), out=both).sum(-1).neg_()
                if grad_lse_boxes is not None:
                    delta += _part(grad_lse_boxes, cut, G)[..., 0]
                grad_scores = room("grad_scores", n, G * T, T)
                grad_scores.copy_(delta.view(n, G * T, 1))
                grad_scores.baddbmm_(go, v_piece.mT).mul_(weights)

                gq_view, gk_view = _part(gq_boxes, cut, G), _part(gk_boxes, cut)
                gq = _target(room, "grad_q", gq_view, n, G * T, D)
                _store(gq_view, torch.baddbmm(gq, grad_scores, k_piece, beta=0, alpha=scale, out=gq))
                gk = _target(room, "grad_k", gk_view, n, T, D)
                _store(gk_view, torch.baddbmm(gk, grad_scores.mT, q_piece, beta=0, alpha=scale, out=gk))
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
_forward.register_autograd(_once(_differentiate), setup_context=_setup)


@register_flop_formula(torch.ops.saccade.shifted_attend)
def _flops(tensors: Any, bias: Any, mask: Any, spec: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Both products of every query with a whole window of keys, as published sizes count them."""
    B, H, N, E = out_shape[0]
    d = len(spec) // 3
    keys = prod(min(n, w) for n, w in zip(spec[:d], spec[d : 2 * d]))
    return int(2 * B * H * N * keys * (tensors[0][-1] + E))
