"""The layer, what it keeps of finished segments while it decodes, and the paper's block around it.

Shape letters: B batch, H query heads, K key heads, N tokens, M keys, D head dim, E width of values, C channels; s
tokens of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.combiner.operator import (
    Map,
    Pooling,
    RowKeys,
    Variant,
    check_variant,
    combiner_attend,
    in_rows,
    pooling_of,
    running_spans,
    span_attention,
)
from saccade.layers.cache import KVCache
from saccade.layers.pre_norm import PreNormBlock
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.pattern import GivenMask, Pattern, Said


class CombinerCache:
    """What decoding keeps: the open segment, and of the past what the variant reads.

    "fixed" keeps one abstraction per finished segment, O(s + n) in all; "rowmajor" row_out and its keys; "mixture" all
    tokens and the abstractions left and right of each; "logn" all tokens, as a merged block's values are computed anew.

    Args:
        variant, segment: those of the layer; "logn" reads no segment.
        pool: how a span's queries and keys become one.
        scale: factor of the dot product.

    Attributes:
        length: tokens seen.
    """

    def __init__(self, variant: Variant, segment: int, pool: Pooling, scale: float) -> None:
        self.length = 0
        self._variant, self.segment_length, self._pool, self._scale = variant, segment, pool, scale
        self._open: list[Tensor] = []  # q, k, v, x of the open segment, (B, H, tokens, D) and (B, 1, tokens, C)
        self._tokens, self._spans, self._right = KVCache(), KVCache(), KVCache()
        self._held: dict[str, tuple[Tensor, Tensor]] = {}  # of KVCaches: all that they hold
        self._above: tuple[Tensor, ...] = ()  # states of q and k, kbar, vbar of the columns above, (B, H, s, D)
        self._blocks: list[tuple[int, tuple[Tensor, ...]]] = []  # level and the same four of each block of [0, length)

    def visible(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values that the next token reads beside its own, (B, H, any, D)."""
        if self._variant == "logn":
            yield from ((parts[2], parts[3]) for _, parts in self._blocks)
            return
        s, b = self.segment_length, self.length % self.segment_length
        if b:
            yield self._open[1], self._open[2]
        if self.length < s:
            return
        if self._variant == "fixed":
            yield self._held["spans"]
            return
        yield (
            _every(self._held["spans"], b, s) if self._variant == "rowmajor" or b else _every(self._held["right"], b, s)
        )
        if self._variant == "mixture":
            rows = self.length // s
            yield _every(tuple(x[:, :, : rows * s] for x in self._held["tokens"]), b, s)
            if 0 < b < s - 1:
                yield _every(self._held["right"], b, s)
            for part in (slice(0, b), slice(b + 1, None)):
                yield self._above[2][:, :, part], self._above[3][:, :, part]

    def append(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, row_keys: RowKeys) -> None:
        """Add tokens (B, H, N, D), x (B, 1, N, C); finished segments are summarised."""
        self.length += q.shape[2]
        if self._variant in ("logn", "mixture"):
            self._held["tokens"] = self._tokens.append(k, v)
        if self._variant == "logn":
            self._count(q, k)
            return
        new = (q, k, v, x)
        self._open = [torch.cat(pair, 2) for pair in zip(self._open, new)] if self._open else list(new)
        done = self._open[0].shape[2] // self.segment_length * self.segment_length
        if done:
            self._close([part[:, :, :done] for part in self._open], row_keys)
            # a copy, so that what is finished is freed
            self._open = [part[:, :, done:].clone() for part in self._open]

    def _close(self, finished: list[Tensor], row_keys: RowKeys) -> None:
        pool, scale, s, heads = self._pool, self._scale, self.segment_length, finished[0].shape[:2]
        q, k, v = (part.flatten(0, 1).unflatten(1, (-1, s)) for part in finished[:3])

        def back(part: Tensor) -> Tensor:
            return part.reshape(*heads, -1, part.shape[-1])

        if self._variant == "fixed":
            _, kbar, vbar = pool.span(q, k, v, None, scale)
            self._held["spans"] = self._spans.append(back(kbar), back(vbar))
        elif self._variant == "rowmajor":
            row_out = back(in_rows(q, k, v, None, scale)[0])
            self._held["spans"] = self._spans.append(row_keys(row_out, finished[3][:, 0]), row_out)
        else:
            for name, store, reverse in (("spans", self._spans, False), ("right", self._right, True)):
                kbar, vbar, _ = running_spans(q, k, v, None, pool, scale, reverse)
                # place b holds what ends before it (begins after it); the place at the border is never read
                kbar, vbar = (y.roll(-1 if reverse else 1, 2) for y in (kbar, vbar))
                self._held[name] = store.append(back(kbar), back(vbar))
            states = tuple(pool.reduce(pool.start(part, None), 1).unflatten(0, heads) for part in (q, k))
            if self._above:
                states = tuple(map(pool.both, self._above, states))
            n = self.length // s
            qbar, kbar = (pool.finish(state, n) for state in states)
            keys, values = (y[:, :, : n * s].unflatten(2, (n, s)).transpose(2, 3) for y in self._held["tokens"])
            self._above = (*states, kbar, span_attention(qbar, keys, values, None, scale))

    def _count(self, q: Tensor, k: Tensor) -> None:
        """The binary counter: blocks of [0, length), largest first; equal ones become one."""
        keys, values = self._held["tokens"]
        start = self.length - q.shape[2]
        while start < self.length:
            # the largest aligned block that begins here and has ended
            level = min((start & -start).bit_length() - 1 if start else 62, (self.length - start).bit_length() - 1)
            inside = slice(start - self.length + q.shape[2], start - self.length + q.shape[2] + (1 << level))
            states = tuple(self._pool.reduce(self._pool.start(x[:, :, inside], None), 2)[:, :, None] for x in (q, k))
            start += 1 << level
            while self._blocks and self._blocks[-1][0] == level:
                states = tuple(map(self._pool.both, self._blocks.pop()[1], states))
                level += 1
            qbar, kbar = (self._pool.finish(state, 1 << level) for state in states)
            block = slice(start - (1 << level), start)
            value = span_attention(qbar[:, :, 0], keys[:, :, block], values[:, :, block], None, self._scale)
            self._blocks.append((level, (*states, kbar, value[:, :, None])))

    @property
    def nbytes(self) -> int:
        """Bytes held (not of the room to grow)."""
        parts = [*self._open, *self._above, *(x for _, block in self._blocks for x in block)]
        stores = self._tokens.nbytes + self._spans.nbytes + self._right.nbytes
        return stores + sum(x.numel() * x.element_size() for x in parts)


def _every(held: tuple[Tensor, ...], first: int, step: int) -> tuple[Tensor, Tensor]:
    return held[0][:, :, first::step], held[1][:, :, first::step]


class Combiner(QKVAttention):
    """Combiner attention as a layer; but for "rowmajor" and "deepset" it has the parameters of `SoftmaxAttention`.

    Args:
        dim, num_heads, num_kv_heads, head_dim, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        causal: False for "fixed" and "mixture" only.
        variant, segment, pooling, own_span: `combiner_attend`'s. Decoding needs `segment` (but for "logn").
        rope: rotary positions, which the paper does not have (keys are pooled over positions).

    Raises:
        ValueError: if the options do not fit.
    """

    takes: tuple[Said, ...] = ("padding",)
    takes_decoding: tuple[Said, ...] = ()

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        variant: Variant = "fixed",
        segment: int | None = None,
        pooling: str = "max",
        own_span: bool = True,
        rope: bool = False,
        **projections: Any,
    ) -> None:
        check_variant(variant, causal, segment)
        super().__init__(dim, num_heads, causal, rope=rope, **projections)
        self.variant, self.segment, self.pooling, self.own_span = variant, segment, pooling, own_span
        self.deepset = nn.Linear(self.head_dim, self.head_dim, bias=False) if pooling.startswith("deepset-") else None
        pooling_of(pooling, self._transform)
        if variant == "rowmajor":
            width = num_heads * self.head_dim
            self.row_proj, self.row_key = nn.Linear(width, dim, bias=False), nn.Linear(dim, width, bias=False)
            self.row_norm = nn.LayerNorm(dim, eps=1e-6)

    def check(self, x_BNC: Tensor, context_BMC: Tensor | None, cache: Any) -> None:
        if context_BMC is not None:
            raise ValueError("Combiner has no cross-attention: its segments are those of one sequence")
        super().check(x_BNC, context_BMC, cache)

    def project(self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None) -> tuple[Any, ...]:
        """Queries, keys and values of H heads, and the tokens, of which "rowmajor" makes further keys."""
        q, k, v = super().project(x_BNC, context_BMC, positions)
        return q, repeat_heads(k, self.num_heads), repeat_heads(v, self.num_heads), x_BNC

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern, x_BNC: Tensor) -> Tensor:
        return self._combine(q_BHND, k_BKMD, v_BKME, pattern, lambda row_out: self._row_keys(row_out, x_BNC))

    @torch.no_grad()
    def remember(
        self, cache: CombinerCache, q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, pattern: Pattern, x_BNC: Tensor
    ) -> Tensor:
        """A prompt at once, then one token after the other."""
        q, k, v = q_BHND, k_BKND, v_BKNE
        if cache.length == 0 and x_BNC.shape[1] > 1:
            out = self.attend(q, k, v, pattern, x_BNC)
            cache.append(q, k, v, x_BNC[:, None], self._row_keys)
            return out
        spans = [slice(t, t + 1) for t in range(x_BNC.shape[1])]
        steps = [self._step(q[:, :, t], k[:, :, t], v[:, :, t], x_BNC[:, None, t], cache) for t in spans]
        return torch.cat(steps, 2) if steps else q

    def _step(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, cache: CombinerCache) -> Tensor:
        """One token: a softmax over all that it may read."""
        seen = [(k, v), *cache.visible()]
        keys, values = (torch.cat([pair[i] for pair in seen], 2) for i in (0, 1))
        out = attend(q, keys, values)
        cache.append(q, k, v, x, self._row_keys)
        return out

    def mix(
        self, x_BNC: Tensor, values_BHME: Tensor, *, context: Tensor | None = None, mask: GivenMask = None
    ) -> Tensor:
        """This layer's weights on `x_BNC`, applied to given values; "rowmajor" has the row keys of its own values."""
        self.check(x_BNC, context, None)
        given = self.pattern(mask, x_BNC, context, None)
        q, k, v, _ = self.project(x_BNC, context, self.positions(x_BNC, context, 0))
        found: list[Tensor] = []

        def of_own_values(row_out: Tensor) -> Tensor:
            found.append(self._row_keys(row_out, x_BNC))
            return found[0]

        if self.variant == "rowmajor":
            self._combine(q, k, v, given, of_own_values)
        return self._combine(q, k, values_BHME, given, lambda row_out: found[0])

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> CombinerCache:
        """An empty cache.

        Raises:
            ValueError: if the layer has no fixed `segment`.
        """
        if self.segment is None and self.variant != "logn":
            raise ValueError("decoding needs a fixed segment, got segment=None")
        pool = pooling_of(self.pooling, self._transform)
        return CombinerCache(self.variant, self.segment or 1, pool, self.head_dim**-0.5)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, variant={self.variant!r}, segment={self.segment}, pooling={self.pooling!r}"

    @property
    def _transform(self) -> Map | None:
        deepset = self.deepset
        return None if deepset is None else lambda x: F.relu(deepset(x))

    def _row_keys(self, row_out_BHNE: Tensor, x_BNC: Tensor) -> Tensor:
        context = self.row_proj(row_out_BHNE.transpose(1, 2).flatten(2)) + x_BNC
        return self.split_heads(self.row_key(self.row_norm(context)), self.num_heads)

    def _combine(self, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, row_keys: Map) -> Tensor:
        return combiner_attend(
            q,
            k,
            v,
            variant=self.variant,
            segment=self.segment,
            causal=self.causal,
            pooling=self.pooling,
            own_span=self.own_span,
            transform=self._transform,
            row_keys=row_keys if self.variant == "rowmajor" else None,
            mask=pattern,
        )


class CombinerLayer(PreNormBlock):
    """The paper's layer: x + attention(norm(x)), then x + MLP(norm(x)).

    Args:
        dim, num_heads, causal, attention: of `Combiner`.
        hidden_dim: of the MLP, 4 dim where None.
    """

    def __init__(
        self, dim: int, num_heads: int = 8, causal: bool = True, *, hidden_dim: int | None = None, **attention: Any
    ) -> None:
        super().__init__(Combiner(dim, num_heads, causal, **attention), dim, hidden_dim)
