"""Nexus as a layer: three readings of what is nested, positions inside and outside, and a cache of every level.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, C channels, D head dim, E width of values.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.attention.nexus.operator import Branches, Inner, Keep, check_options, keep_nothing, nested
from saccade.layers.cache import NamedCache
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops.attend import attend
from saccade.ops.heads import repeat_heads
from saccade.ops.masks import Mask
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.rope import rotate
from saccade.ops.sharding import places


class Nexus(QKVAttention):
    """Higher-order attention as a layer; S and R have the parameters of `SoftmaxAttention` and take its weights.

    Decoding keeps V, the nested keys, and what the inner attentions read: raw Q and K in S (twice a KV cache at order
    2), the inner keys in R (1.5 times). One step is as many attention rows as the parallel form has attentions.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        order: m.
        branches: "both", "query" or "key".
        sharing: "S", "R" or "U", see the paper's page.
        recurse_values: Phi_{r-1} instead of Z as the inner values (S and U, order 3 and up).
        inner_positions: rotary positions inside as well.
        rope_channels: rotate these first channels of a head only (Pythia: a quarter); all where None.
        norm_inner: RMS norm, without weight, of the nested keys.
        gate: learned g between the plain (g = 0, the start) and the nested queries and keys, one each.

    Raises:
        ValueError: if an argument is out of range, or in R if num_heads * head_dim is not dim.
    """

    takes_parts = True

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        order: int = 2,
        branches: Branches = "both",
        sharing: Literal["S", "R", "U"] = "S",
        recurse_values: bool = False,
        inner_positions: bool = True,
        rope_channels: int | None = None,
        norm_inner: bool = False,
        gate: bool = False,
        **projections: Any,
    ) -> None:
        check_options(order, branches)
        if sharing not in ("S", "R", "U"):
            raise ValueError(f"sharing must be 'S', 'R' or 'U', got {sharing!r}")
        if recurse_values and sharing == "R":
            raise ValueError("recurse_values is for sharing 'S' and 'U', got 'R'")
        super().__init__(dim, num_heads, causal, **projections)
        if sharing == "R" and num_heads * self.head_dim != dim:
            raise ValueError(f"sharing 'R' needs num_heads * head_dim = dim ({dim}), got {num_heads * self.head_dim}")
        if rope_channels is not None and (rope_channels % 2 or not 0 <= rope_channels <= self.head_dim):
            raise ValueError(f"rope_channels must be even and at most head_dim ({self.head_dim}), got {rope_channels}")
        self.order, self.branches, self.sharing, self.recurse_values = order, branches, sharing, recurse_values
        self.inner_positions, self.rope_channels, self.norm_inner = inner_positions, rope_channels, norm_inner
        self.nests_queries = order > 1 and branches != "key"
        self.nests_keys = order > 1 and branches != "query"
        bias = self.q_proj.bias is not None
        if sharing == "U" and self.nests_queries:
            width = num_heads * self.head_dim
            self.q_inner = nn.ModuleDict({part: nn.Linear(dim, width, bias=bias) for part in ("key", "value")})
        if sharing == "U" and self.nests_keys:
            width = self.num_kv_heads * self.head_dim
            self.k_inner = nn.ModuleDict({part: nn.Linear(dim, width, bias=bias) for part in ("key", "value")})
        self.q_gate = nn.Parameter(torch.zeros(())) if gate and self.nests_queries else None
        self.k_gate = nn.Parameter(torch.zeros(())) if gate and self.nests_keys else None

    def check(self, x_BNC: Tensor, context_BMC: Tensor | None, cache: Any) -> None:
        super().check(x_BNC, context_BMC, cache)
        if context_BMC is not None and self.sharing == "R":
            raise ValueError("sharing 'R' refines one sequence and takes no context")

    def pattern(self, mask: GivenMask, x_BNC: Tensor, context_BMC: Tensor | None, cache: Any) -> Pattern:
        found = super().pattern(mask, x_BNC, context_BMC, cache)
        return found if context_BMC is None else found.only(("padding",), "Nexus with a context")

    def project(self, x_BNC: Tensor, context_BMC: Tensor | None, positions: Tensor | None) -> tuple[Any, ...]:
        """Queries, keys and values without positions, which depend on the level; and the tokens that they are of."""
        projected = super().project(x_BNC, context_BMC, None)
        return *projected, x_BNC, x_BNC if context_BMC is None else context_BMC

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern, x_BNC: Tensor, tokens_BMC: Tensor
    ) -> Tensor:
        q, k = self._nested(q_BHND, k_BKMD, v_BKME, pattern, x_BNC, tokens_BMC, keep_nothing)
        return attend(q, k, v_BKME, mask=pattern.mask)

    def remember(
        self,
        cache: NamedCache,
        q_BHND: Tensor,
        k_BKND: Tensor,
        v_BKNE: Tensor,
        pattern: Pattern,
        x_BNC: Tensor,
        tokens_BNC: Tensor,
    ) -> Tensor:
        v_BKME = cache.append("value", v_BKNE)
        q, k = self._nested(q_BHND, k_BKND, v_BKME, pattern, x_BNC, tokens_BNC, cache.append)
        return attend(q, k, v_BKME, mask=pattern.mask)

    def mix(
        self, x_BNC: Tensor, values_BHME: Tensor, *, context: Tensor | None = None, mask: GivenMask = None
    ) -> Tensor:
        """The outer weights on given values."""
        self.check(x_BNC, context, None)
        pattern = self.pattern(mask, x_BNC, context, None)
        q, k, v, *tokens = self.project(x_BNC, context, None)
        q, k = self._nested(q, k, v, pattern, tokens[0], tokens[1], keep_nothing)
        return attend(q, repeat_heads(k, self.num_heads), values_BHME, mask=pattern.mask)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> NamedCache:
        return NamedCache()

    def start_as_softmax(self) -> None:
        """U starts as S; with `gate` every reading starts equal to the softmax layer."""
        if self.sharing == "U":
            for nests, plain, inner in (
                (self.nests_queries, self.q_proj, "q_inner"),
                (self.nests_keys, self.k_proj, "k_inner"),
            ):
                for projection in getattr(self, inner).values() if nests else ():
                    projection.load_state_dict(plain.state_dict())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, order={self.order}, branches={self.branches}, sharing={self.sharing}"

    def _nested(
        self, q: Tensor, k: Tensor, v_BKMD: Tensor, pattern: Pattern, x_BNC: Tensor, tokens_BMC: Tensor, keep: Keep
    ) -> tuple[Tensor, Tensor]:
        """Q_m of the new tokens and K_m of all, rotated for the outer attention."""
        start, positioned = pattern.offset, self.rope and not pattern.crosses

        def place(x: Tensor, first: int, really: bool = positioned) -> Tensor:
            if not really:
                return x
            positions = first + places(x.shape[2], x.device)
            return rotate(x, positions, base=self.rope_base, channels=self.rope_channels)

        inside = positioned and self.inner_positions

        def inner(mask: Mask | None) -> Inner:
            return lambda q, k, v: attend(place(q, start, inside), place(k, 0, inside), v, mask=mask)

        q2, k2 = q, k
        if self.sharing == "R":
            for level in range(self.order - 1):
                keys = keep(f"key {level}", place(k2, start, inside))
                out = attend(place(q2, start, inside), keys, v_BKMD, mask=pattern.mask)
                refined_BNC = out.transpose(1, 2).flatten(2)
                q2 = self.split_heads(self.q_proj(refined_BNC), self.num_heads)
                k2 = self.split_heads(self.k_proj(refined_BNC), self.num_kv_heads)
        else:
            # padding of a context says nothing of the queries' own tokens
            if self.nests_queries:
                q2 = self._nest(q, x_BNC, "q", inner(None if pattern.crosses else pattern.mask), keep)
            if self.nests_keys:
                k2 = self._nest(k, tokens_BMC, "k", inner(pattern.mask), keep)
        q2, k2 = q2 if self.nests_queries else q, k2 if self.nests_keys else k
        if self.norm_inner and self.nests_keys:
            k2 = F.rms_norm(k2, k2.shape[-1:])
        q2 = q2 if self.q_gate is None else torch.lerp(q, q2, self.q_gate)
        k2 = k2 if self.k_gate is None else torch.lerp(k, k2, self.k_gate)
        return place(q2, start), keep("nested key", place(k2, start))

    def _nest(self, z: Tensor, tokens_BNC: Tensor, name: str, inner: Inner, keep: Keep) -> Tensor:
        if self.sharing == "S":
            return nested(z, self.order - 1, inner, recurse_values=self.recurse_values, keep=keep, name=name)
        maps = self.q_inner if name == "q" else self.k_inner
        keys, values = (keep(f"{name} {part}", self.split_heads(maps[part](tokens_BNC), z.shape[1])) for part in maps)
        phi = inner(z, keys, values)
        for level in range(1, self.order - 1):
            keys = keep(f"{name} {level}", phi)
            phi = inner(phi, keys, keys if self.recurse_values else values)
        return phi
