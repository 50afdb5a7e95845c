"""The four variants as functions of tensors, on spans that are pooled once and joined by their log-sum-exps.

Shape letters: B batch, H query heads, K key heads, N tokens, D head dim, E width of values; G = B H, L = n s tokens
with those that fill up the last of n segments of s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.heads import check_qkv, repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.merge import merge
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.selection import running_max

Variant = Literal["fixed", "logn", "rowmajor", "mixture"]
Attended = tuple[Tensor, Tensor]
Map = Callable[[Tensor], Tensor]
RowKeys = Callable[[Tensor, Tensor], Tensor]
_VARIANTS = ("fixed", "logn", "rowmajor", "mixture")
_INF = math.inf


def combiner_attend(
    q_BHND: Tensor,
    k_BKND: Tensor,
    v_BKNE: Tensor,
    *,
    variant: Variant = "fixed",
    segment: int | None = None,
    causal: bool = True,
    pooling: str = "max",
    own_span: bool = True,
    transform: Map | None = None,
    row_keys: Map | None = None,
    mask: GivenMask = None,
    scale: float | None = None,
) -> Tensor:
    """sum_j p(j|i) v_j with p of the variant. One segment, or segments of one token: "fixed" is dense attention.

    Memory linear in N for "fixed", "rowmajor" and "mixture", O(N log N) numbers besides for "logn". Exact gradients.

    Args:
        q_BHND, k_BKND, v_BKNE: self-attention; K divides H; E may differ from D.
        variant: see the paper's page; "logn" has no segments.
        segment: s, about sqrt(N) where None (a multiple of 16 from 16 on).
        causal: "logn" and "rowmajor" are causal only.
        pooling: "max", "mean" or "sum", with "relu-", "identity-" or "deepset-" before it.
        own_span: in the bidirectional "fixed", also the span of the own segment.
        transform: of queries and keys before they are pooled, for "deepset-...".
        row_keys: row_out (B, H, N, E) -> keys (B, H, N, D) of "rowmajor"; each token's own key where None.
        mask: bool (B, N), True = real token, or the same as a mask object. Queries that are padding give 0.
        scale: factor of the dot product, D ** -0.5 where None; above 0.

    Returns:
        (B, H, N, E).

    Raises:
        ValueError: if shapes or options do not fit, or the mask is of another kind.
    """
    check_qkv(q_BHND, k_BKND, v_BKNE, tokens="same")
    B, H, N, D = q_BHND.shape
    scale = D**-0.5 if scale is None else float(scale)
    if scale <= 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    check_variant(variant, causal, segment)
    pool = pooling_of(pooling, transform)
    if 0 in (B, N):
        return q_BHND.new_zeros(B, H, N, v_BKNE.shape[3]) + 0 * (q_BHND.sum() + k_BKND.sum() + v_BKNE.sum())
    real_BN = Pattern.of(mask, B, N, N, causal=causal).only(("padding",), "Combiner").real_keys(B)
    s = 1 if variant == "logn" else segment_length(N, segment)
    L = -(-N // s) * s if variant != "logn" else 1 << (N - 1).bit_length()
    q, k, v = (
        F.pad(x, (0, 0, 0, L - N)).flatten(0, 1) if N < L else x.flatten(0, 1)
        for x in (q_BHND, repeat_heads(k_BKND, H), repeat_heads(v_BKNE, H))
    )
    ok = None
    if real_BN is not None or (not causal and N < L):
        real_BN = torch.ones(B, N, dtype=torch.bool, device=q.device) if real_BN is None else real_BN
        ok = F.pad(real_BN, (0, L - N))[:, None].expand(B, H, L).flatten(0, 1)
        q, k, v = (x.masked_fill(~ok[..., None], 0.0) for x in (q, k, v))
    if variant == "logn":
        out = _logn(q, k, v, ok, pool, scale)
    else:
        q, k, v = (x.unflatten(1, (-1, s)) for x in (q, k, v))
        ok = None if ok is None else ok.unflatten(1, (-1, s))
        if variant == "fixed":
            out = _fixed(q, k, v, ok, pool, scale, causal, own_span)
        elif variant == "mixture":
            out = (_mixture if causal else _mixture_both)(q, k, v, ok, pool, scale)
        else:
            row_out, _ = in_rows(q, k, v, ok, scale)
            keys = k
            if row_keys is not None:
                flat = row_keys(row_out.reshape(B, H, L, -1)[:, :, :N])
                keys = F.pad(flat, (0, 0, 0, L - N)).reshape(q.shape)
            local = in_rows(q, k, v, ok, scale, masks.causal())
            out, _ = _join(local, _rows_before(q, keys, row_out, ok, scale))
        out = out.flatten(1, 2)
    out = out.unflatten(0, (B, H))[:, :, :N]
    return out if real_BN is None else out.masked_fill(~real_BN[:, None, :, None], 0.0)


@dataclass(frozen=True)
class Pooling:
    """Pooled queries and keys of a span; a state is a maximum or a sum, which can be added to."""

    kind: str
    transform: Map | None

    def start(self, x: Tensor, ok: Tensor | None) -> Tensor:
        """The state of each token alone, (..., D); what is not `ok` counts for nothing."""
        x = x if self.transform is None else self.transform(x)
        return x if ok is None else x.masked_fill(~ok[..., None], -_INF if self.kind == "max" else 0.0)

    def reduce(self, state: Tensor, dim: int) -> Tensor:
        """The state of a span from those of its tokens, along `dim`."""
        return state.amax(dim) if self.kind == "max" else state.sum(dim)

    def both(self, a: Tensor, b: Tensor) -> Tensor:
        """The state of two spans together."""
        return torch.maximum(a, b) if self.kind == "max" else a + b

    def running(self, state: Tensor, dim: int) -> Tensor:
        """The states of all spans that begin at the start of `dim`."""
        if self.kind != "max":
            return state.cumsum(dim)
        return state.cummax(dim).values if state.requires_grad else running_max(state, dim)

    def finish(self, state: Tensor, count: Tensor | int) -> Tensor:
        """The pooled vector of a span of `count` tokens; 0 where there are none."""
        if self.kind == "mean":
            return state / (count.clamp(min=1)[..., None] if isinstance(count, Tensor) else count)
        return state.masked_fill(state == -_INF, 0.0) if isinstance(count, Tensor) and self.kind == "max" else state

    def span(self, q: Tensor, k: Tensor, v: Tensor, ok: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled queries, pooled keys and expected values of spans (..., tokens, D): each (..., D)."""
        count = q.shape[-2] if ok is None else ok.sum(-1)
        qbar, kbar = (self.finish(self.reduce(self.start(x, ok), -2), count) for x in (q, k))
        return qbar, kbar, span_attention(qbar, k, v, ok, scale)


def span_attention(qbar: Tensor, k: Tensor, v: Tensor, ok: Tensor | None, scale: float) -> Tensor:
    """sum_j softmax_j(scale qbar . k_j) v_j over the tokens of each span."""
    if k.shape[-2] == 1:
        return v[..., 0, :]
    logits = _dots(k, qbar) * scale
    if ok is not None:  # finite, for spans of padding alone
        logits = logits.masked_fill(~ok, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1)
    if k.shape[-2] < 16:
        return (weights[..., None] * v).sum(-2)
    return (weights[..., None, :] @ v)[..., 0, :]


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """x_j . y of (..., tokens, D) and (..., D): products and sums where matrix products would be tiny."""
    return (x * y[..., None, :]).sum(-1) if x.shape[-2] < 16 else (x @ y[..., None])[..., 0]


def _fixed(
    q: Tensor, k: Tensor, v: Tensor, ok: Tensor | None, pool: Pooling, scale: float, causal: bool, own_span: bool
) -> Tensor:
    """A: own segment, and one abstraction for each of the others. All (G, n, s, D)."""
    local = in_rows(q, k, v, ok, scale, masks.causal() if causal else None)
    n, s = q.shape[1:3]
    if n == 1 and (causal or not own_span):
        return local[0]
    _, kbar, vbar = pool.span(q, k, v, ok, scale)
    exists = None if ok is None else ok.any(-1)
    if causal:
        kbar, vbar = (x[:, :, None].expand(-1, -1, s, -1) for x in (kbar, vbar))
        exists = None if exists is None else exists[..., None].expand(-1, -1, s)
        return _join(local, _rows_before(q, kbar, vbar, exists, scale))[0]
    allowed = None if exists is None else exists[:, None, None]
    if not own_span:
        others = ~torch.eye(n, dtype=torch.bool, device=q.device).repeat_interleave(s, 0)
        allowed = others if allowed is None else allowed & others
    out, lse = _attend(q.flatten(1, 2)[:, None], kbar[:, None], vbar[:, None], allowed, scale)
    return _join(local, (out[:, 0].unflatten(1, (n, s)), lse[:, 0].unflatten(1, (n, s))))[0]


def _logn(q: Tensor, k: Tensor, v: Tensor, ok: Tensor | None, pool: Pooling, scale: float) -> Tensor:
    """B: itself, and the blocks of the binary decomposition of [0, i). All (G, L, D), L a power of 2."""
    L = q.shape[1]
    q = q * scale
    logits = [(q * k).sum(-1)]
    values = []
    q_state, k_state = pool.start(q, ok), pool.start(k, ok)
    for level in range(L.bit_length() - 1):
        size = 1 << level
        left = [None if x is None else x.unflatten(1, (-1, 2, size))[:, :, 0] for x in (k, v, ok)]
        count = size if left[2] is None else left[2].sum(-1)
        qbar, kbar = (pool.finish(x[:, 0::2], count) for x in (q_state, k_state))
        values.append(span_attention(qbar, left[0], left[1], left[2], 1.0))  # type: ignore[arg-type]
        here = _dots(q.unflatten(1, (-1, 2, size))[:, :, 1], kbar)
        if left[2] is not None:
            here = here.masked_fill(~left[2].any(-1, keepdim=True), -_INF)
        logits.append(F.pad(here[:, :, None], (0, 0, 1, 0), value=-_INF).flatten(1))
        q_state, k_state = (pool.both(x[:, 0::2], x[:, 1::2]) for x in (q_state, k_state))
    weights = torch.stack(logits, -1).softmax(-1)
    out = weights[..., :1] * v
    for level, value in enumerate(values):
        right = weights[..., level + 1].unflatten(1, (-1, 2, 1 << level))[:, :, 1, :, None]
        out.unflatten(1, (-1, 2, 1 << level))[:, :, 1].addcmul_(right, value[:, :, None])
    return out


def _mixture(q: Tensor, k: Tensor, v: Tensor, ok: Tensor | None, pool: Pooling, scale: float) -> Tensor:
    """D: own column above and own row, other columns above, left and right parts of earlier rows. All (G, n, s, D)."""
    n, s = q.shape[1:3]
    joint = in_rows(q, k, v, ok, scale, masks.causal())
    joint = _join(joint, _rows_before(q, k, v, ok, scale))
    if n > 1 and s > 1:
        columns = running_spans(_columns(q), _columns(k), _columns(v), _columns_ok(ok), pool, scale)
        kbar, vbar = (_columns(x)[:, :-1] for x in columns[:2])
        some = None if columns[2] is None else columns[2].transpose(1, 2)[:, :-1]
        others = ~torch.eye(s, dtype=torch.bool, device=q.device)
        joint = _join(joint, _pad(in_rows(q[:, 1:], kbar, vbar, some, scale, masks.dense(others[None, None])), 1, 1, 0))
        for reverse in (False, True):
            kbar, vbar, some = running_spans(q, k, v, ok, pool, scale, reverse)
            shifted, here = (slice(1, None), slice(0, -1)) if reverse else (slice(0, -1), slice(1, None))
            seen = None if some is None else some[:, :, shifted]
            rows = _rows_before(q[:, :, here], kbar[:, :, shifted], vbar[:, :, shifted], seen, scale)
            joint = _join(joint, None if rows is None else _pad(rows, 2, int(not reverse), int(reverse)))
    return joint[0]


def _mixture_both(q: Tensor, k: Tensor, v: Tensor, ok: Tensor | None, pool: Pooling, scale: float) -> Tensor:
    """E: own row, own column, and summaries of both sides at each column of the row and each row of the column."""
    turned_q, turned_k, turned_v = (_columns(x) for x in (q, k, v))
    turned_ok = _columns_ok(ok)
    joint = in_rows(q, k, v, ok, scale)
    joint = _join(joint, _turn(in_rows(turned_q, turned_k, turned_v, turned_ok, scale)))
    for reverse in (False, True):
        away, here = (slice(1, None), slice(0, -1)) if reverse else (slice(0, -1), slice(1, None))
        front = int(not reverse), int(reverse)
        if q.shape[1] > 1:  # columns above (below), at each column of the own row
            kbar, vbar, some = running_spans(turned_q, turned_k, turned_v, turned_ok, pool, scale, reverse)
            kbar, vbar = _columns(kbar)[:, away], _columns(vbar)[:, away]
            some = None if some is None else some.transpose(1, 2)[:, away]
            joint = _join(joint, _pad(in_rows(q[:, here], kbar, vbar, some, scale), 1, *front))
        if q.shape[2] > 1:  # rows to the left (right), at each row of the own column
            kbar, vbar, some = running_spans(q, k, v, ok, pool, scale, reverse)
            kbar, vbar = _columns(kbar)[:, away], _columns(vbar)[:, away]
            some = None if some is None else some.transpose(1, 2)[:, away]
            joint = _join(joint, _turn(_pad(in_rows(turned_q[:, here], kbar, vbar, some, scale), 1, *front)))
    return joint[0]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Mask | None, scale: float) -> Attended:
    if isinstance(mask, Tensor):
        mask = mask if mask.ndim == 4 else mask[(None,) * (4 - mask.ndim)]
    return attend(q, k, v, mask=mask, scale=scale, return_lse=True)


def in_rows(q: Tensor, k: Tensor, v: Tensor, ok: Tensor | None, scale: float, mask: Mask | None = None) -> Attended:
    """Attention within each row of (G, n, s, D): out (G, n, s, E) and lse (G, n, s)."""
    rows = q.shape[:2]
    if ok is not None:
        real = masks.dense(ok.flatten(0, 1)[:, None, None])
        mask = real if mask is None else mask & real
    # a row for each batch entry, so that the kernel writes tokens in their order
    q, k, v = (x.flatten(0, 1)[:, None] for x in (q, k, v))
    out, lse = _attend(q, k, v, mask, scale)
    return out[:, 0].unflatten(0, rows), lse[:, 0].unflatten(0, rows)


def _rows_before(q: Tensor, k: Tensor, v: Tensor, ok: Tensor | None, scale: float) -> Attended | None:
    """Attention of (a, b) to the keys (r, b) of the rows r < a; None where there is one row."""
    if q.shape[1] < 2:
        return None
    mask: Mask = masks.causal()
    if ok is not None:
        mask = mask & masks.dense(ok.transpose(1, 2)[:, :, None, :-1])
    q, k, v = (_columns(x) for x in (q[:, 1:], k[:, :-1], v[:, :-1]))
    out, lse = _attend(q, k, v, mask, scale)
    return _pad((_columns(out), _columns(lse)), 1, 1, 0)


def running_spans(
    q: Tensor, k: Tensor, v: Tensor, ok: Tensor | None, pool: Pooling, scale: float, reverse: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """kbar and vbar of the span from the start (or end) of each row to each token, that one too; whether it is one."""
    if reverse:
        turned = running_spans(q.flip(2), k.flip(2), v.flip(2), None if ok is None else ok.flip(2), pool, scale)
        return turned[0].flip(2), turned[1].flip(2), None if turned[2] is None else turned[2].flip(2)
    count = torch.arange(1, q.shape[2] + 1, device=q.device) if ok is None else ok.cumsum(2)
    qbar, kbar = (pool.finish(pool.running(pool.start(x, ok), 2), count) for x in (q, k))
    vbar, _ = in_rows(qbar, k, v, ok, scale, masks.causal())
    return kbar, vbar, None if ok is None else count > 0


def _columns(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _columns_ok(ok: Tensor | None) -> Tensor | None:
    return None if ok is None else ok.transpose(1, 2)


def _turn(part: Attended) -> Attended:
    return _columns(part[0]), _columns(part[1])


def _pad(part: Attended, dim: int, front: int, back: int) -> Attended:
    """Rows (dim 1) or columns (dim 2) that attend to nothing."""
    out, lse = part
    sides = (front, back) if dim == 2 else (0, 0, front, back)
    return F.pad(out, (0, 0, *sides)), F.pad(lse, sides, value=-_INF)


def _join(a: Attended, b: Attended | None) -> Attended:
    return a if b is None else merge(*b, *a)


def pooling_of(pooling: str, transform: Map | None) -> Pooling:
    """The pooling of a name such as "max" or "relu-max"; ValueError for another, or for a transform out of place."""
    before, _, kind = pooling.rpartition("-")
    if kind not in ("max", "mean", "sum") or before not in ("", "identity", "relu", "deepset"):
        raise ValueError(
            f"pooling must be 'max', 'mean' or 'sum', with 'relu-', 'identity-' or 'deepset-', got {pooling!r}"
        )
    if (before == "deepset") != (transform is not None):
        raise ValueError(f"a transform belongs to 'deepset-...' pooling, got {pooling!r} and {transform}")
    return Pooling(kind, F.relu if before == "relu" else transform)


def segment_length(N: int, segment: int | None) -> int:
    """s for N tokens: what is given, or the root of N, rounded up, from 16 on to a multiple of 16."""
    if segment is not None:
        return min(segment, N)
    root = math.isqrt(N - 1) + 1
    return root if root < 16 else -(-root // 16) * 16


def check_variant(variant: str, causal: bool, segment: int | None) -> None:
    """Raise ValueError unless there is such a variant with these options."""
    if variant not in _VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(_VARIANTS)}, got {variant!r}")
    if not causal and variant in ("logn", "rowmajor"):
        raise ValueError(f"variant {variant!r} is causal only, got causal=False")
    if segment is not None and segment < 1:
        raise ValueError(f"segment must be at least 1, got {segment}")
