"""Multi-Token Attention as a layer.

Shape letters: B batch, H query heads, K key heads, N queries, M keys, R rows of a block with those before it, m keys of
a block, D head dim, E width of values, P heads that a kernel reads, Q and T sizes of a kernel over queries and keys.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from saccade.attention.multi_token.operator import Kernels, PadKey, _attend, key_origin
from saccade.layers.cache import KVCache
from saccade.layers.qkv_attention import QKVAttention, as_mask
from saccade.ops import masks
from saccade.ops.masks import Mask
from saccade.ops.rope import rotate

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
    """Multi-Token Attention as a layer. Decoding keeps keys, values and the last 2 (c_q - 1) queries.

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
        return Kernels(self.kernel, self.kernel_after, self.mixing, self.head_mixing, self.pad_key)

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: Tensor | Mask | None = None,
        cache: Any = None,
    ) -> Tensor:
        """`QKVAttention.forward` with a cache of `new_cache`; with a cache, `mask` is padding (B, M).

        Raises:
            ValueError: if the arguments do not fit together.
        """
        self._check(x_BNC, context_BMC, cache)
        if cache is not None and x_BNC.shape[1] == 0:
            return x_BNC
        start = 0 if cache is None else cache.length
        q_BHND, k_BKMD = self._queries_and_keys(x_BNC, context_BMC, start)
        v_BKMD = self._heads(self.v_proj(x_BNC if context_BMC is None else context_BMC), self.num_kv_heads)
        held = 0
        if cache is not None:
            k_BKMD, v_BKMD = cache.append(k_BKMD, v_BKMD)
            held = -q_BHND.shape[2]
            q_BHND = cache.extend(q_BHND)
            held += q_BHND.shape[2]
        pairs = as_mask(mask, k_BKMD)
        if cache is not None and not (pairs is None or isinstance(pairs, masks.Padding)):
            raise ValueError(f"with a cache the mask must be padding (batch, tokens so far), got {pairs!r}")
        if isinstance(pairs, masks.Padding) and context_BMC is None and not self.causal:
            # a padded query sees real keys, and must not reach the next row; a causal one at the left sees none
            valid_BN = pairs.valid_BM
            pairs = pairs & masks.function(lambda b, h, q, k: valid_BN[b, q] & (k >= 0), batch=valid_BN.shape[0])
        causal = self.causal and context_BMC is None
        dropout = self.dropout if self.training else 0.0
        if pairs is not None and cache is None:
            pairs.check(q_BHND.shape[2], k_BKMD.shape[2])
        out_BHND = _attend(q_BHND, k_BKMD, v_BKMD, self.kernels, pairs, causal, start - held, held, dropout=dropout)
        if self.norm is not None:
            out_BHND = self.norm(out_BHND) * self.norm_factor
        if self.gate is not None:
            out_BHND = out_BHND * self.gate(out_BHND).sigmoid()
        return self.out_proj(out_BHND.transpose(1, 2).flatten(2))

    def attend(
        self, q_BHND: Tensor, k_BKMD: Tensor, v_BKME: Tensor, *, mask: Mask | None, causal: bool, offset: int
    ) -> Tensor:
        """A'' v, before norm and gate."""
        return _attend(q_BHND, k_BKMD, v_BKME, self.kernels, mask, causal, offset, 0)

    def new_cache(
        self, batch_size: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> MultiTokenCache:
        return MultiTokenCache(self.kernels.reach)

    def _queries_and_keys(self, x_BNC: Tensor, context_BMC: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
        if self.rope_pairs == "halves" or not self.rope or context_BMC is not None:
            return super()._queries_and_keys(x_BNC, context_BMC, start)
        positions_N = torch.arange(start, start + x_BNC.shape[1], device=x_BNC.device)
        tensors = []
        for projection, heads in ((self.q_proj, self.num_heads), (self.k_proj, self.num_kv_heads)):
            # neighbours to halves: the same order in queries and keys leaves their products as they are
            pairs = self._heads(projection(x_BNC), heads).unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
            tensors.append(rotate(pairs, positions_N, base=self.rope_base))
        return tensors[0], tensors[1]
