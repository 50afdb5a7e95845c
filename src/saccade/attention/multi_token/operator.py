"""Attention whose scores and weights are convolved and mixed, block of queries after block, as a function of tensors.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, R rows of a block with those before it, m keys of
a block, D head dim, E width of values, P heads that a kernel reads, Q and T sizes of a kernel over queries and keys;
X strips of c columns, in the gradient of a kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from saccade.ops.autocast import exact, one_type
from saccade.ops.pattern import GivenMask, Pattern

PadKey = Literal["both", "left", "right"]


#: columns per matrix product in the gradient of a kernel
_COLUMNS = 16


#: MiB of a block without gradients: what stays near the caches is twice as fast; the backward pass gains by large ones
_FORWARD_MB = 16.0


#: arrays of the size of a block's scores that live at a time, without and with gradients
_ARRAYS = (4, 12)


class _Depthwise(torch.autograd.Function):
    """conv2d with one kernel per head, (B, H, R, m) -> (B, H, R - Q + 1, m).

    The gradient of a kernel, theta_ab: sum_ij G_ij S_i+a,j+b, is Q batches of matrix products over strips of columns,
    of which the diagonals count: seven times as fast on the CPU as torch's.
    """

    @staticmethod
    @exact
    def forward(ctx: Any, scores: Tensor, kernel_H1QT: Tensor, left: int) -> Tensor:
        ctx.save_for_backward(scores, kernel_H1QT)
        ctx.left = left
        return _correlate(scores, kernel_H1QT, 0, left, kernel_H1QT.shape[3] - 1 - left)

    @staticmethod
    @exact
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        scores, kernel_H1QT = ctx.saved_tensors
        (H, _, Q, T), left = kernel_H1QT.shape, ctx.left
        grad_scores = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_scores = _correlate(grad, kernel_H1QT.flip(2, 3), Q - 1, T - 1 - left, left)
        if ctx.needs_input_grad[1]:
            (B, _, n, m), fill = grad.shape, -grad.shape[3] % _COLUMNS
            width = _COLUMNS + T - 1
            padded = F.pad(scores, (left, T - 1 - left + fill))
            strips_XRc = padded.unfold(3, width, _COLUMNS).flatten(0, 1).flatten(1, 2)
            grad_XRc = F.pad(grad, (0, fill)).reshape(B * H, -1, _COLUMNS)
            across = (m + fill) // _COLUMNS
            products = torch.stack(
                [strips_XRc[:, a * across : (a + n) * across].mT @ grad_XRc for a in range(Q)], 1
            ).flatten(2)
            # column c of strip b + c: T diagonals
            starts = torch.arange(T, device=grad.device)[:, None] * _COLUMNS
            diagonals = starts + torch.arange(_COLUMNS, device=grad.device) * (_COLUMNS + 1)
            grad_kernel = products[..., diagonals].sum(-1).view(B, H, 1, Q, T).sum(0)
        return grad_scores, grad_kernel, None


def _correlate(x_BHRm: Tensor, kernel_HPQT: Tensor, rows: int, left: int, right: int) -> Tensor:
    """conv2d with `rows` of zeros above and below, and zeros at the sides."""
    if left != right:
        x_BHRm, left = F.pad(x_BHRm, (left, right)), 0
    return F.conv2d(x_BHRm, kernel_HPQT, padding=(rows, left), groups=x_BHRm.shape[1] // kernel_HPQT.shape[1])


def _convolve(scores: Tensor, kernel_HPQT: Tensor, pad_key: PadKey) -> Tensor:
    """(B, H, R, m) -> (B, H, R - Q + 1, m): row r reads rows r to r + Q - 1."""
    T = kernel_HPQT.shape[3]
    left = key_origin(T, pad_key)
    if kernel_HPQT.shape[1] == 1 and torch.is_grad_enabled():
        return _Depthwise.apply(*one_type(scores, kernel_HPQT), left)
    return _correlate(scores, kernel_HPQT, 0, left, T - 1 - left)


def key_origin(size: int, pad_key: PadKey) -> int:
    """o, the kernel's element over keys that is the key itself."""
    return {"both": (size - 1) // 2, "left": size - 1, "right": 0}[pad_key]


@dataclass(frozen=True)
class _Hidden:
    """The pairs of a block that are hidden: bool (B or 1, H or 1, R, m - start) over the columns from `start` on.

    Attributes:
        foreign: a pair that row i' sees may be one that a later row does not (documents, windows).
        empty: rows may see nothing.
    """

    pairs: Tensor | None
    start: int
    foreign: bool
    empty: bool

    def fill_(self, x_BHRm: Tensor, value: float) -> Tensor:
        """Put `value` at the hidden pairs of a block's last rows, in place."""
        if self.pairs is not None:
            x_BHRm[..., self.start :].masked_fill_(self.pairs[:, :, -x_BHRm.shape[2] :], value)
        return x_BHRm

    def filled(self, x_BHRm: Tensor, value: float) -> Tensor:
        """The same without touching `x_BHRm`."""
        if self.pairs is None:
            return x_BHRm
        assert self.start == 0
        return x_BHRm.masked_fill(self.pairs[:, :, -x_BHRm.shape[2] :], value)


@dataclass(frozen=True)
class Kernels:
    """What is learned about the score matrix; None where a step is left out.

    Attributes:
        before, after: (H, P, c_q, c_k) of the convolutions before and after the softmax; P heads of a group are read
            together, 1 for a kernel per head.
        mixing: W (H, H), [to, from], before the softmax.
        heads: K (H / c_h, c_h, c_h), [group, from, to], after it.
        pad_key: where a kernel lies over the keys.
    """

    before: Tensor | None = None
    after: Tensor | None = None
    mixing: Tensor | None = None
    heads: Tensor | None = None
    pad_key: PadKey = "both"

    @property
    def reach(self) -> int:
        """Rows before a query that its output reads."""
        return sum(kernel.shape[2] - 1 for kernel in (self.before, self.after) if kernel is not None)

    def check(self, H: int) -> None:
        """Raises ValueError where a shape does not fit H heads."""
        if self.pad_key not in ("both", "left", "right"):
            raise ValueError(f"pad_key must be 'both', 'left' or 'right', got {self.pad_key!r}")
        for name, kernel in (("before", self.before), ("after", self.after)):
            if kernel is None:
                continue
            if kernel.ndim != 4 or kernel.shape[0] != H or not kernel.shape[1] or H % kernel.shape[1]:
                raise ValueError(
                    f"kernel {name} must be (heads = {H}, heads in a group, c_q, c_k), got {tuple(kernel.shape)}"
                )
            if 0 in kernel.shape or (self.pad_key == "both" and not kernel.shape[3] % 2):
                raise ValueError(f"pad_key 'both' needs an odd number of keys in a kernel, got {kernel.shape[3]}")
        if self.mixing is not None and self.mixing.shape != (H, H):
            raise ValueError(f"mixing must be {(H, H)}, got {tuple(self.mixing.shape)}")
        if self.heads is not None and (
            self.heads.ndim != 3 or self.heads.shape[1] != self.heads.shape[2] or math.prod(self.heads.shape[:2]) != H
        ):
            raise ValueError(f"heads must be (groups, c_h, c_h) with {H} heads in all, got {tuple(self.heads.shape)}")


def multi_token_attend(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    kernels: Kernels,
    *,
    mask: GivenMask = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    memory_mb: float = 64.0,
) -> Tensor:
    """A'' v, (B, H, N, E): attention whose scores and weights are convolved and mixed by `kernels`.

    Args:
        q_BHND, k_BKMD, v_BKME: queries, keys, values; K divides H.
        kernels: what is convolved and mixed, for H heads.
        mask: (B, M) padding, 4 axes of pairs, or a mask object; True = may attend.
        causal: no query attends to a later key.
        scale: of the dot products, D ** -0.5 where None.
        dropout: probability that a weight of A is dropped.
        memory_mb: what a block of queries may take, in MiB; with long sequences, at least 16 queries.

    Raises:
        ValueError: if shapes do not fit.
    """
    H, K = q_BHND.shape[1], k_BKMD.shape[1]
    if K < 1 or H % K or k_BKMD.shape[:3] != v_BKME.shape[:3] or q_BHND.shape[3] != k_BKMD.shape[3]:
        raise ValueError(
            f"query, key and value do not fit: {tuple(q_BHND.shape)}, {tuple(k_BKMD.shape)}, {tuple(v_BKME.shape)}"
        )
    if memory_mb <= 0:
        raise ValueError(f"memory_mb must be positive, got {memory_mb}")
    kernels.check(H)
    pattern = Pattern.of(mask, q_BHND.shape[0], q_BHND.shape[2], k_BKMD.shape[2], heads=H, causal=causal)
    return attend_in_blocks(q_BHND, k_BKMD, v_BKME, kernels, pattern, 0, scale, dropout, memory_mb)


def attend_in_blocks(
    q_BHND: Tensor,
    k_BKMD: Tensor,
    v_BKME: Tensor,
    kernels: Kernels,
    pattern: Pattern,
    skip: int,
    scale: float | None = None,
    dropout: float = 0.0,
    memory_mb: float = 64.0,
) -> Tensor:
    """Query 0 stands at key `pattern.offset`; the first `skip` queries are only there for those after them."""
    (B, H, N, D), M = q_BHND.shape, k_BKMD.shape[2]
    q_BHND = q_BHND * (D**-0.5 if scale is None else scale)
    grad = torch.is_grad_enabled()
    memory_mb = memory_mb if grad else min(memory_mb, _FORWARD_MB)
    row_bytes = max(1, B * H * M) * q_BHND.element_size() * _ARRAYS[grad]
    size = max(16, int(memory_mb * 2**20 / row_bytes) - kernels.reach)
    if size >= N - skip:
        return _block(q_BHND, k_BKMD, v_BKME, kernels, pattern, 0, skip, dropout)
    outs = []
    for start in range(skip, N, size):
        first, end = max(0, start - kernels.reach), min(start + size, N)
        keys = min(M, pattern.offset + end) if pattern.causal else M
        arguments = (q_BHND[:, :, first:end], k_BKMD[:, :, :keys], v_BKME[:, :, :keys])
        block = partial(
            _block,
            kernels=kernels,
            pattern=pattern,
            first=first,
            skip=start - first,
            dropout=dropout,
        )
        outs.append(checkpoint(block, *arguments, use_reentrant=False) if grad else block(*arguments))
    return torch.cat(outs, 2)


def _block(
    q_BHRD: Tensor,
    k_BKmD: Tensor,
    v_BKmE: Tensor,
    kernels: Kernels,
    pattern: Pattern,
    first: int,
    skip: int,
    dropout: float,
) -> Tensor:
    """Rows `first` on of the queries, all heads; the first `skip` outputs are left out."""
    (B, H, R, D), (K, m) = q_BHRD.shape, k_BKmD.shape[1:3]
    hidden = _hidden(pattern, first, (B, H, R, m), q_BHRD.device)
    scores = (q_BHRD.reshape(B, K, H // K * R, D) @ k_BKmD.mT).view(B, H, R, m)
    if kernels.before is not None:
        scores = _convolved(hidden.fill_(scores, 0.0), kernels.before, kernels.pad_key, hidden, first == 0)
    if kernels.mixing is not None:
        scores = (kernels.mixing @ scores.flatten(2)).view(scores.shape)
    # a row that sees nothing must not be NaN on the way
    lowest = torch.finfo(torch.float32).min if hidden.empty else -torch.inf
    weights = hidden.fill_(scores.float() if scores.dtype.itemsize < 4 else scores, lowest).softmax(-1)
    weights = weights.to(v_BKmE.dtype)
    if hidden.empty:
        weights = hidden.filled(weights, 0.0)
    if dropout:
        weights = F.dropout(weights, dropout)
    if kernels.after is not None:
        weights = _convolved(weights, kernels.after, kernels.pad_key, hidden, first == 0)
        weights = hidden.fill_(weights, 0.0)
    if first == 0:  # nothing before: the convolutions gave a row for each
        weights = weights[:, :, skip:]
    if kernels.heads is not None:
        groups, size = kernels.heads.shape[:2]
        rows = weights.shape[2]
        weights = (kernels.heads.mT @ weights.reshape(B, groups, size, rows * m)).view(B, H, rows, m)
        if hidden.pairs is not None and hidden.pairs.shape[1] > 1:  # what another head may see
            weights = hidden.fill_(weights, 0.0)
    rows = weights.shape[2]
    out = weights.reshape(B, K, H // K * rows, m) @ v_BKmE
    return out.view(B, H, rows, v_BKmE.shape[3])


def _convolved(x_BHRm: Tensor, kernel: Tensor, pad_key: PadKey, hidden: _Hidden, is_first: bool) -> Tensor:
    """Row i reads its c_q - 1 predecessors; zeros stand for those before the first block's first."""
    Q = kernel.shape[2]
    if is_first and Q > 1:
        x_BHRm = F.pad(x_BHRm, (0, 0, Q - 1, 0))
    if not hidden.foreign:
        return _convolve(x_BHRm, kernel, pad_key)
    rows = x_BHRm.shape[2] - Q + 1
    return sum(  # type: ignore[return-value]
        _convolve(hidden.filled(x_BHRm[:, :, a : a + rows], 0.0), kernel[:, :, a : a + 1], pad_key) for a in range(Q)
    )


def _hidden(pattern: Pattern, first: int, shape: tuple[int, int, int, int], device: torch.device) -> _Hidden:
    (B, H, R, m), mask = shape, pattern.rest
    start = min(m, first + pattern.offset + 1) if pattern.causal and mask is None else 0
    pairs = None
    row = torch.arange(first, first + R, device=device)[:, None]
    key = torch.arange(start, m, device=device)
    if pattern.causal and start < m:
        pairs = (key > row + pattern.offset)[None, None]
    if mask is None:
        return _Hidden(pairs, start, foreign=False, empty=False)
    b, h = (torch.arange(size, device=device) for size in (B, H))
    banned = ~mask.allowed(b[:, None, None, None], h[:, None, None], row, key)
    banned = banned[(None,) * (4 - banned.ndim)]
    banned = banned.expand(*banned.shape[:2], R, m)
    foreign = {*pattern.says} - {"causal", "padding"}
    return _Hidden(banned if pairs is None else banned | pairs, 0, foreign=bool(foreign), empty=True)
