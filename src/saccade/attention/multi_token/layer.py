"""The layer: kernels that start as the identity, norm and gate of the heads, and the queries that decoding keeps.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, D head dim, E width of values, P heads that a
kernel reads, Q and T sizes of a kernel over queries and keys.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from saccade.attention.multi_token.operator import Kernels, PadKey, attend_in_blocks, key_origin
from saccade.layers.cache import KVCache
from saccade.layers.qkv_attention import QKVAttention
from saccade.ops import masks
from saccade.ops.pattern import Pattern, Said

if TYPE_CHECKING:
    from typing_extensions import Self


class MultiTokenCache(KVCache):
    """Keys, values, and the last queries that the convolutions read again.

    Args:
        reach: how many.
    """

    def __init__(self, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.queries: Tensor | None = None

    def extend(self, q_BHND: Tensor) -> Tensor:
        """The queries held, followed by the new ones; the last `reach` of them are kept."""
        if self.queries is not None:
            q_BHND = torch.cat([self.queries, q_BHND], 2)
        self.queries = q_BHND[:, :, max(0, q_BHND.shape[2] - self.reach) :].detach().clone()
        return q_BHND

    @property
    def nbytes(self) -> int:
        """Bytes of keys, values and queries held."""
        queries = 0 if self.queries is None else self.queries.numel() * self.queries.element_size()
        return super().nbytes + queries


class MultiTokenAttention(QKVAttention):
    """Multi-Token Attention between projections. Decoding keeps keys, values and the last 2 (c_q - 1) queries.

    The authors put the convolutions into every fourth layer (`kernel_size=None` elsewhere); head mixing, norm and gate
    into all.

    Args:
        dim, num_heads, causal, num_kv_heads, head_dim, rope, rope_base, qkv_bias, proj_bias: `QKVAttention`'s.
        kernel_size, kernel_size_after: (c_q, c_k) before and after the softmax, or None.
        kernel_heads: heads in a group that a kernel reads together.
        pad_key: "both" (c_k odd), "left" or "right".
        mix_heads: linear mixing of the heads' scores.
        head_kernel: c_h, heads in a group whose weights are mixed; num_heads where None, 0 for none.
        group_norm: RMS norm of each head's output.
        depth: the layer's number, for the norm's factor 1 - lambda; None for factor 1.
        gate: "scalar", "vector" or None.
        dropout: of A, in training.
        rope_pairs: which channels rotate together, "halves" (i, i + D / 2) or "neighbours" (2 i, 2 i + 1).

    Raises:
        ValueError: if an argument is out of range.
    """

    takes_decoding: tuple[Said, ...] = ("padding",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = False,
        *,
        kernel_size: tuple[int, int] | None = (6, 11),
        kernel_size_after: tuple[int, int] | None = (6, 11),
        kernel_heads: int = 1,
        pad_key: PadKey = "both",
        mix_heads: bool = True,
        head_kernel: int | None = None,
        group_norm: bool = True,
        depth: int | None = None,
        gate: Literal["scalar", "vector"] | None = "scalar",
        dropout: float = 0.0,
        rope_pairs: Literal["halves", "neighbours"] = "halves",
        **projections: Any,
    ) -> None:
        super().__init__(dim, num_heads, causal, **projections)
        head_kernel = num_heads if head_kernel is None else head_kernel
        for name, heads, least in (("kernel_heads", kernel_heads, 1), ("head_kernel", head_kernel, 0)):
            if heads < least or (heads and num_heads % heads):
                raise ValueError(f"{name} must divide num_heads ({num_heads}), got {heads}")
        for name, kernel in (("kernel_size", kernel_size), ("kernel_size_after", kernel_size_after)):
            if kernel is not None and (len(kernel) != 2 or min(kernel) < 1):
                raise ValueError(f"{name} must be two positive sizes (queries, keys), got {kernel}")
        if gate not in ("scalar", "vector", None):
            raise ValueError(f"gate must be 'scalar', 'vector' or None, got {gate!r}")
        if depth is not None and not group_norm:
            raise ValueError("depth is a factor of the group norm, got group_norm=False")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        if rope_pairs not in ("halves", "neighbours"):
            raise ValueError(f"rope_pairs must be 'halves' or 'neighbours', got {rope_pairs!r}")
        self.pad_key, self.dropout, self.rope_pairs = pad_key, dropout, rope_pairs
        self.kernel = None if kernel_size is None else nn.Parameter(torch.empty(num_heads, kernel_heads, *kernel_size))
        self.kernel_after = (
            None
            if kernel_size_after is None
            else nn.Parameter(torch.empty(num_heads, kernel_heads, *kernel_size_after))
        )
        self.mixing = nn.Parameter(torch.empty(num_heads, num_heads)) if mix_heads else None
        self.head_mixing = (
            nn.Parameter(torch.empty(num_heads // head_kernel, head_kernel, head_kernel)) if head_kernel else None
        )
        self.norm = nn.RMSNorm(self.head_dim, eps=1e-5) if group_norm else None
        self.norm_factor = 1.0 if depth is None else 1.0 - (0.8 - 0.6 * math.exp(-0.3 * depth))
        self.gate = nn.Linear(self.head_dim, 1 if gate == "scalar" else self.head_dim) if gate else None
        self.kernels.check(num_heads)
        self.start_as_softmax()
        if self.gate is not None:
            nn.init.trunc_normal_(self.gate.weight, std=dim**-0.5)

    @classmethod
    def from_softmax(cls, module: nn.Module, **arguments: Any) -> Self:
        """`QKVAttention.from_softmax`; equal to the layer at the start, so without norm and gate unless asked for."""
        return super().from_softmax(module, **{"group_norm": False, "gate": None, **arguments})

    @torch.no_grad()
    def start_as_softmax(self) -> None:
        """Identity kernels and mixing."""
        for kernel in (self.kernel, self.kernel_after):
            if kernel is not None:
                H, P, Q, T = kernel.shape
                head = torch.arange(H)
                kernel.zero_()[head, head % P, Q - 1, key_origin(T, self.pad_key)] = 1.0
        if self.mixing is not None:
            self.mixing.copy_(torch.eye(self.num_heads))
        if self.head_mixing is not None:
            self.head_mixing.copy_(torch.eye(self.head_mixing.shape[1]))

    @property
    def kernels(self) -> Kernels:
        """The learned kernels and mixings, as `multi_token_attend` takes them."""
        return Kernels(self.kernel, self.kernel_after, self.mixing, self.head_mixing, self.pad_key)

    def remember(
        self, cache: MultiTokenCache, q_BHND: Tensor, k_BKND: Tensor, v_BKNE: Tensor, pattern: Pattern
    ) -> Tensor:
        if not q_BHND.shape[2]:
            return q_BHND
        k_BKMD, v_BKME = cache.append(k_BKND, v_BKNE)
        extended = cache.extend(q_BHND)
        held = extended.shape[2] - q_BHND.shape[2]
        # queries that are held stand before other keys
        pattern = replace(pattern, causal=True, offset=pattern.offset - held)
        return attend_in_blocks(extended, k_BKMD, v_BKME, self.kernels, pattern, held, dropout=self._dropout)

    def attend(self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, pattern: Pattern) -> Tensor:
        """A'' v, before norm and gate."""
        B, N = q_BHND.shape[0], q_BHND.shape[2]
        real_BN = pattern.real_queries(B, N)
        if real_BN is not None and not self.causal and pattern.says == ("padding",):
            # a padded query sees real keys, and must not reach the next row; a causal one at the left sees none
            pairs = masks.function(lambda b, h, q, k: real_BN[b, q] & (k >= 0), batch=B)
            pattern = replace(pattern, pairs=pairs)
        return attend_in_blocks(q_BHND, k_BKMD, v_BKME, self.kernels, pattern, 0, dropout=self._dropout)

    def out(self, out_BHNE: Tensor) -> Tensor:
        if self.norm is not None:
            out_BHNE = self.norm(out_BHNE) * self.norm_factor
        if self.gate is not None:
            out_BHNE = out_BHNE * self.gate(out_BHNE).sigmoid()
        return super().out(out_BHNE)

    def rotate(self, x_BHND: Tensor, positions: Tensor) -> Tensor:
        if self.rope_pairs == "neighbours":
            # to halves: the same order in queries and keys leaves their products as they are
            x_BHND = x_BHND.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return super().rotate(x_BHND, positions)

    @property
    def _dropout(self) -> float:
        return self.dropout if self.training else 0.0

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MultiTokenCache:
        return MultiTokenCache(self.kernels.reach)
