"""Sensory, relational and dual attention as layers, with what they keep while they decode.

Shape letters: B batch, N queries, M keys, C channels, H heads, K key heads, D head dim of the scores, E of the
values (the paper's d), R relations, W neighbours.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from saccade.attention.relational.operator import ACTIVATIONS, compare, relational_attend
from saccade.attention.relational.symbols import RETRIEVERS, RelationalSymbolicAttention
from saccade.layers.cache import KVCache, NamedCache
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.pattern import GivenMask, Pattern


class SensoryAttention(QKVAttention):
    """Standard attention whose output projection stays on its own heads (n_sa d -> n_sa d); rotary pairs interleaved.

    Args:
        dim, num_heads, causal: as in `QKVAttention`.
        key_dim: width of queries and keys, `head_dim` where None; the scale is `head_dim` ** -0.5 all the same.
        kv_bias: biases of keys and values.
        dropout: of the output.
        **arguments: `QKVAttention`'s.

    Raises:
        ValueError: if `key_dim` is below 1, or odd with rotary positions, or `QKVAttention` refuses an argument.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        key_dim: int | None = None,
        kv_bias: bool = False,
        dropout: float = 0.0,
        **arguments: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **arguments)
        width = num_heads * self.head_dim
        self.out_proj = nn.Linear(width, width, bias=self.out_proj.bias is not None)
        if key_dim is not None and key_dim != self.head_dim:
            if key_dim < 1 or (self.rope and key_dim % 2):
                raise ValueError(f"key_dim must be positive, and even with rotary positions, got {key_dim}")
            self.q_proj = nn.Linear(dim, num_heads * key_dim, bias=self.q_proj.bias is not None)
            self.k_proj = nn.Linear(dim, self.num_kv_heads * key_dim, bias=self.k_proj.bias is not None)
        if kv_bias:
            self.k_proj, self.v_proj = (nn.Linear(dim, p.out_features) for p in (self.k_proj, self.v_proj))
        self.dropout = nn.Dropout(dropout)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        return attend(q_BHND, k_BKMD, v_BKME, mask=pattern.mask, scale=self.head_dim**-0.5)

    def out(self, out_BHNE: Tensor) -> Tensor:
        return self.dropout(super().out(out_BHNE))

    def split_heads(self, x_BNC: Tensor, heads: int) -> Tensor:
        return x_BNC.unflatten(-1, (heads, -1)).transpose(1, 2)

    def rotate(self, x_BHND: Tensor, positions: Tensor) -> Tensor:
        # pairs to halves: products do not see in which order the channels stand
        return super().rotate(x_BHND.unflatten(-1, (-1, 2)).mT.flatten(-2), positions)


class RelationalAttention(SensoryAttention):
    """Relational heads: `module(x, symbols)`.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, proj_bias, key_dim, kv_bias, dropout: as in
            `SensoryAttention`; grouped heads share keys and symbol values, not relations.
        num_relations: R, `num_heads` where None.
        relation_dim: p, num_heads * head_dim / R where None.
        relation_activation: a name of `ACTIVATIONS`.
        symmetric: r_ij = r_ji.

    Raises:
        ValueError: if R does not divide num_heads * head_dim (where `relation_dim` is not given), or the activation
            is unknown.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        num_relations: int | None = None,
        relation_dim: int | None = None,
        relation_activation: str = "identity",
        symmetric: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **arguments)
        width = num_heads * self.head_dim
        self.num_relations = num_heads if num_relations is None else num_relations
        if self.num_relations < 1 or (relation_dim is None and width % self.num_relations):
            raise ValueError(f"num_relations must divide the heads' width ({width}), got {num_relations}")
        if relation_activation not in ACTIVATIONS:
            raise ValueError(
                f"relation_activation must be one of {', '.join(ACTIVATIONS)}, got {relation_activation!r}"
            )
        self.relation_activation = relation_activation
        relation_width = width if relation_dim is None else self.num_relations * relation_dim
        self.q_rel_proj = nn.Linear(dim, relation_width, bias=False)
        self.k_rel_proj = self.q_rel_proj if symmetric else nn.Linear(dim, relation_width, bias=False)
        self.relation_weights = nn.Parameter(torch.empty(num_heads, self.head_dim, self.num_relations))
        nn.init.kaiming_uniform_(self.relation_weights, a=math.sqrt(5))

    def forward(  # type: ignore[override]
        self,
        x_BNC: Tensor,
        symbols: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: NamedCache | None = None,
    ) -> Tensor:
        """(B, N, num_heads * head_dim).

        Args:
            symbols: of the tokens that are attended to (B, M, C), with a cache of the new ones; a table of distances
                (2 m + 1, C); or of pairs (1 or B, N, M, C).
            mask: as in `QKVAttention.forward`.

        Raises:
            ValueError: if the arguments do not fit together.
        """
        return self.steps(x_BNC, context_BMC, mask, cache, symbols=symbols)

    def project(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None,
        positions: Tensor | None,
        *,
        symbols: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """q, k, values of symbols, and the relations' queries and keys; without symbols, which `mix` replaces, those
        of the weights alone."""
        q, k, v = super().project(x_BNC, context_BMC, positions)
        if symbols is None:
            return q, k, v
        if symbols.ndim not in (2, 3, 4) or symbols.shape[-1] != self.dim:
            raise ValueError(
                f"symbols must be (B, M, {self.dim}), a table (2 m + 1, {self.dim}) or pairs (B, N, M, {self.dim}), "
                f"got {tuple(symbols.shape)}"
            )
        values = self.v_proj(symbols).unflatten(-1, (self.num_kv_heads, -1))
        values = values if symbols.ndim == 4 else values.transpose(-3, -2)
        source = x_BNC if context_BMC is None else context_BMC
        q_rel, k_rel = self._relation_heads(self.q_rel_proj(x_BNC)), self._relation_heads(self.k_rel_proj(source))
        return q, k, values, q_rel, k_rel

    def remember(  # type: ignore[override]
        self,
        cache: NamedCache,
        q_BHND: Tensor,
        k_BKND: Tensor,
        values: Tensor,
        pattern: Pattern,
        q_rel: Tensor,
        k_rel: Tensor,
    ) -> Tensor:
        k_BKMD, k_rel = cache.append("key", k_BKND), cache.append("relation key", k_rel)
        if values.ndim == 4:  # of tokens; a table and pairs are complete
            values = cache.append("symbol", values)
        return self.attend(q_BHND, k_BKMD, values, pattern, q_rel, k_rel)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern, *relations: Tensor) -> Tensor:
        if not relations:
            return super().attend(q_BHND, k_BKMD, v_BKME, pattern)
        q_rel, k_rel = relations
        return relational_attend(
            q_BHND,
            k_BKMD,
            q_rel,
            k_rel,
            v_BKME,
            self.relation_weights,
            activation=self.relation_activation,
            mask=pattern.rest,
            causal=pattern.causal,
            offset=pattern.offset,
            scale=self.head_dim**-0.5,
        )

    def relations(self, x_BNC: Tensor, context_BMC: Tensor | None = None) -> Tensor:
        """r (B, N, M, R), for looking inside; quadratic."""
        keys = self.k_rel_proj(x_BNC if context_BMC is None else context_BMC)
        pair = self._relation_heads(self.q_rel_proj(x_BNC)), self._relation_heads(keys)
        return compare(*pair, self.relation_activation).permute(0, 2, 3, 1)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> NamedCache:
        return NamedCache()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_relations={self.num_relations}"

    def _relation_heads(self, x_BNC: Tensor) -> Tensor:
        return x_BNC.unflatten(-1, (self.num_relations, -1)).transpose(1, 2)


class DualCache:
    """Keys and values of the sensory heads; keys, symbol values and relation keys of the relational ones; the last
    tokens, where symbols look back at them."""

    def __init__(self) -> None:
        self.sensory, self.relational = KVCache(), NamedCache()
        self.tail_BWC: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens seen."""
        return max(self.sensory.length, self.relational.length)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held."""
        tail = 0 if self.tail_BWC is None else self.tail_BWC.numel() * self.tail_BWC.element_size()
        return self.sensory.nbytes + self.relational.nbytes + tail


class DualAttention(nn.Module):
    """Sensory and relational heads side by side, with symbols of their own.

    Args:
        dim, num_heads, causal: channels, all heads, no token attends to a later one.
        relational_heads: how many of the heads are relational, half where None; 0 is multi-head attention.
        symbols: "symbolic", "positional", "relative" or "relational" (see `RETRIEVERS`), or None: `forward` gets them.
        symbol_options: the retriever's further arguments.
        num_kv_heads: key heads of all heads; or a pair, of the sensory and of the relational heads. Grouped alike.
        rope, rope_base, dropout: of both branches.
        proj_bias, kv_bias: biases of the output, of keys and values; or a pair, of the two branches.
        share_attention: both branches have the same W_q and W_k (as many heads each).
        num_relations, relation_dim, relation_activation, symmetric, key_dim: `RelationalAttention`'s.

    Raises:
        ValueError: if the head counts do not fit together, or an argument is wrong.
    """

    takes_parts = False

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        relational_heads: int | None = None,
        symbols: str | None = "symbolic",
        symbol_options: dict[str, Any] | None = None,
        num_kv_heads: int | tuple[int | None, int | None] | None = None,
        rope: bool = True,
        rope_base: float = 10000.0,
        proj_bias: bool | tuple[bool, bool] = False,
        kv_bias: bool | tuple[bool, bool] = False,
        dropout: float = 0.0,
        share_attention: bool = False,
        num_relations: int | None = None,
        relation_dim: int | None = None,
        relation_activation: str = "identity",
        symmetric: bool = False,
        key_dim: int | None = None,
    ) -> None:
        super().__init__()
        if dim < 1 or num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim, both at least 1, got {num_heads} and {dim}")
        relational_heads = num_heads // 2 if relational_heads is None else relational_heads
        if not 0 <= relational_heads <= num_heads:
            raise ValueError(f"relational_heads must be between 0 and num_heads ({num_heads}), got {relational_heads}")
        if symbols is not None and symbols not in RETRIEVERS:
            raise ValueError(f"symbols must be one of {', '.join(RETRIEVERS)}, or None, got {symbols!r}")
        sensory_heads = num_heads - relational_heads
        if share_attention and sensory_heads != relational_heads:
            raise ValueError(f"share_attention needs as many heads in both, got {sensory_heads} and {relational_heads}")
        self.dim, self.num_heads, self.causal, self.relational_heads = dim, num_heads, causal, relational_heads
        if isinstance(num_kv_heads, int):
            group = num_heads // num_kv_heads if num_kv_heads > 0 and num_heads % num_kv_heads == 0 else 0
            if not group or sensory_heads % group or relational_heads % group:
                raise ValueError(
                    f"num_kv_heads must group {sensory_heads} sensory and {relational_heads} relational heads alike, "
                    f"got {num_kv_heads}"
                )
            num_kv_heads = (sensory_heads // group or None, relational_heads // group or None)
        sensory_kv, relational_kv = num_kv_heads or (None, None)
        common: dict[str, Any] = {
            "head_dim": dim // num_heads,
            "rope": rope,
            "rope_base": rope_base,
            "dropout": dropout,
        }
        proj_biases, kv_biases = ((b, b) if isinstance(b, bool) else b for b in (proj_bias, kv_bias))
        biases = [{"proj_bias": p, "kv_bias": kv} for p, kv in zip(proj_biases, kv_biases, strict=True)]
        self.sensory = self.relational = self.retriever = None
        if sensory_heads:
            shared = key_dim if share_attention else None
            self.sensory = SensoryAttention(
                dim, sensory_heads, causal, num_kv_heads=sensory_kv, key_dim=shared, **biases[0], **common
            )
        if relational_heads:
            self.relational = RelationalAttention(
                dim,
                relational_heads,
                causal,
                num_kv_heads=relational_kv,
                num_relations=num_relations,
                relation_dim=relation_dim,
                relation_activation=relation_activation,
                symmetric=symmetric,
                key_dim=key_dim,
                **biases[1],
                **common,
            )
            if symbols is not None:
                options = {"causal": causal} if symbols == "relational" else {}
                self.retriever = RETRIEVERS[symbols](dim, **{**options, **(symbol_options or {})})
        if share_attention and self.sensory is not None and self.relational is not None:
            if self.sensory.k_proj.weight.shape != self.relational.k_proj.weight.shape:
                raise ValueError(f"share_attention needs the same key heads in both, got {num_kv_heads}")
            self.sensory.q_proj, self.sensory.k_proj = self.relational.q_proj, self.relational.k_proj

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        symbols: Tensor | None = None,
        mask: GivenMask = None,
        cache: DualCache | None = None,
    ) -> Tensor:
        """concat(sensory heads, relational heads), (B, N, C).

        Args:
            symbols: instead of the retriever's; see `RelationalAttention.forward`.
            mask: bool (B, M) or over pairs, the same for every head.

        Raises:
            ValueError: if the arguments do not fit together, or there are no symbols.
        """
        QKVAttention.check(self, x_BNC, context_BMC, cache)  # type: ignore[arg-type]
        (B, N), start, crosses = x_BNC.shape[:2], 0 if cache is None else cache.length, context_BMC is not None
        M = start + N if context_BMC is None else context_BMC.shape[1]
        pattern = Pattern.of(mask, B, N, M, causal=self.causal, offset=start, crosses=crosses)
        if pattern.pairs is not None and pattern.pairs.heads != 1:
            raise ValueError("the mask must be the same for every head, got one by head")
        parts = []
        if self.relational is not None and symbols is None:
            symbols = self._symbols(x_BNC if context_BMC is None else context_BMC, pattern, cache)
        if self.sensory is not None:
            inner = None if cache is None else cache.sensory
            parts.append(self.sensory(x_BNC, context_BMC, mask=pattern, cache=inner))
        if self.relational is not None:
            store = None if cache is None else cache.relational
            parts.append(self.relational(x_BNC, symbols, context_BMC, mask=pattern, cache=store))
        return torch.cat(parts, -1)

    def mix(self, x_BNC: Tensor, values_BHME: Tensor, *, mask: GivenMask = None) -> Tensor:
        """The heads' weights alpha, the sensory heads first, on given values."""
        branches = [branch for branch in (self.sensory, self.relational) if branch is not None]
        split = values_BHME.split([branch.num_heads for branch in branches], 1)
        return torch.cat([branch.mix(x_BNC, v, mask=mask) for branch, v in zip(branches, split, strict=True)], 1)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> DualCache:
        """An empty cache for `forward(x, cache=cache)`."""
        return DualCache()

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, relational_heads={self.relational_heads}, causal={self.causal}"

    def _symbols(self, tokens: Tensor, pattern: Pattern, cache: DualCache | None) -> Tensor:
        if self.retriever is None:
            raise ValueError("this layer has no symbols of its own: give forward(symbols=...)")
        looks_right = isinstance(self.retriever, RelationalSymbolicAttention) and not self.retriever.causal
        if looks_right and pattern.rest is not None:
            raise ValueError("relational symbols that look to the right take no mask: neighbours would be padding")
        return retrieve(self.retriever, tokens, pattern.offset, cache)


def retrieve(retriever: nn.Module, x_BNC: Tensor, start: int, cache: DualCache | None) -> Tensor:
    """Symbols of new tokens; `cache` hands on the tokens that the next ones look back at."""
    past = None if cache is None else cache.tail_BWC
    reach = getattr(retriever, "past_tokens", 0)
    if cache is not None and reach:
        known = x_BNC.detach() if past is None else torch.cat([past, x_BNC.detach()], 1)
        cache.tail_BWC = known[:, -reach:].clone()
    return retriever(x_BNC, start=start, past_BWC=past)
