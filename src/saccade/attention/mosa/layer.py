"""The layer: sparse heads and other heads side by side, with what both cost.

Shape letters: B batch, N tokens, M tokens so far, C channels, H all heads, D head dim, F width of given values.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from saccade.attention.mosa.other_heads import OtherHeads
from saccade.attention.mosa.sparse_heads import MoSACache, SparseHeads, budget
from saccade.ops.pattern import GivenMask, Pattern
from saccade.ops.sharding import refuse_parts


class MoSA(nn.Module):
    """Sparse expert-choice heads plus dense or local heads, outputs summed; see the paper's page.

    Args:
        dim: channels C.
        num_heads: all heads, sparse and other.
        causal: attention by position; the choice of tokens is never causal (see the paper's page).
        num_other_heads: dense (or local) heads among them; num_heads // 2 where None, 0 is the pure layer.
        sparsity: rho; a head picks N // rho tokens, at least 2.
        window: makes the other heads local, in buckets of this many tokens (causal only).
        routing: "learned", or "fixed": the baseline of every rho-th token without router and gate.
        include_first: every head picks the first token.
        head_dim: D, dim / num_heads where None.
        rotate_fraction: share of D that is rotated, 0 to 1.
        rope_base: base of the rotation.
        max_length: longest sequence that `new_cache` is for.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        causal: bool = True,
        *,
        num_other_heads: int | None = None,
        sparsity: int = 16,
        window: int | None = None,
        routing: Literal["learned", "fixed"] = "learned",
        include_first: bool = False,
        head_dim: int | None = None,
        rotate_fraction: float = 0.5,
        rope_base: float = 10000.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        num_other_heads = num_heads // 2 if num_other_heads is None else num_other_heads
        if dim < 1 or num_heads < 1:
            raise ValueError(f"dim and num_heads must be positive, got {dim} and {num_heads}")
        if not 0 <= num_other_heads <= num_heads:
            raise ValueError(f"num_other_heads must be between 0 and num_heads ({num_heads}), got {num_other_heads}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads must divide dim ({dim}) where head_dim is not given, got {num_heads}")
        head_dim = dim // num_heads if head_dim is None else head_dim
        if head_dim < 1 or sparsity < 1:
            raise ValueError(f"head_dim and sparsity must be positive, got {head_dim} and {sparsity}")
        if not 0 <= rotate_fraction <= 1:
            raise ValueError(f"rotate_fraction must be between 0 and 1, got {rotate_fraction}")
        if routing not in ("learned", "fixed"):
            raise ValueError(f"routing must be 'learned' or 'fixed', got {routing!r}")
        if window is not None and (window < 1 or not causal):
            raise ValueError(f"window must be positive and the layer causal, got window={window}, causal={causal}")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be positive, got {max_length}")
        self.dim, self.num_heads, self.causal, self.sparsity = dim, num_heads, causal, sparsity
        self.head_dim, self.max_length = head_dim, max_length
        self.num_sparse_heads, self.num_other_heads = num_heads - num_other_heads, num_other_heads
        self.sparse = self.other = None
        if self.num_sparse_heads:
            self.sparse = SparseHeads(
                dim,
                self.num_sparse_heads,
                head_dim,
                sparsity=sparsity,
                causal=causal,
                routing=routing,
                include_first=include_first,
                rotate_fraction=rotate_fraction,
                rope_base=rope_base,
            )
        if num_other_heads:
            self.other = OtherHeads(
                dim,
                num_other_heads,
                head_dim,
                causal=causal,
                window=window,
                rotate_fraction=rotate_fraction,
                rope_base=rope_base,
            )

    def forward(
        self,
        x_BNC: Tensor,
        context_BMC: Tensor | None = None,
        *,
        mask: GivenMask = None,
        cache: MoSACache | None = None,
    ) -> Tensor:
        """The layer's output (B, N, C).

        Args:
            mask: bool (B, N), True = real token; with a cache (B, all tokens so far).
            cache: of `new_cache`; consumes a prompt or a token, without gradients.

        Raises:
            ValueError: if the arguments do not fit; a context is not supported.
        """
        refuse_parts("MoSA")
        if context_BMC is not None:
            raise ValueError("MoSA attends within one sequence: context must be None")
        real_BM = self._real_tokens(x_BNC, mask, 0 if cache is None else cache.length)
        if cache is not None:
            return self._decode(x_BNC, real_BM, cache)
        parts = [heads(x_BNC, real_BM) for heads in (self.sparse, self.other) if heads is not None]
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @torch.no_grad()
    def _decode(self, x_BNC: Tensor, mask_BM: Tensor | None, cache: MoSACache) -> Tensor:
        if not self.causal:
            raise ValueError("only a causal layer decodes with a cache")
        out_BNC = torch.zeros_like(x_BNC) if self.other is None else self.other(x_BNC, mask_BM, cache.other)
        if self.sparse is not None:
            cache.fit(self.sparse, x_BNC)
            # token by token: who is kept when a token comes is the rule itself
            for n in range(x_BNC.shape[1]):
                real_B = None if mask_BM is None else mask_BM[:, cache.length]
                out_BNC[:, n : n + 1] += self.sparse.step(x_BNC[:, n : n + 1], cache, real_B)
                cache.length += 1
        else:
            cache.length += x_BNC.shape[1]
        return out_BNC

    def new_cache(
        self,
        batch_size: int,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        max_length: int | None = None,
    ) -> MoSACache:
        """An empty cache for up to `max_length` tokens (the constructor's where None), k = max_length // sparsity.

        Raises:
            ValueError: if no max_length is given, or the routing is fixed.
        """
        max_length = self.max_length if max_length is None else max_length
        if max_length is None or max_length < 1:
            raise ValueError(f"decoding needs max_length, here or in the constructor, to know k; got {max_length}")
        if self.sparse is not None and self.sparse.router is None:
            raise ValueError("decoding needs routing='learned', got 'fixed'")
        return MoSACache(max(max_length // self.sparsity, 2), None if self.other is None else self.other.window)

    def mix(self, x_BNC: Tensor, values_BHNF: Tensor, *, mask: GivenMask = None) -> Tensor:
        """This layer's weights on `x_BNC` (gates included), applied to given values (B, H, N, F); sparse heads first.

        What `attention_map` calls; H is `num_heads`.
        """
        real_BN = self._real_tokens(x_BNC, mask, 0)
        parts_BHNF = values_BHNF.split([self.num_sparse_heads, self.num_other_heads], 1)
        return torch.cat(
            [
                heads.mix(x_BNC, part_BHNF, real_BN)
                for heads, part_BHNF in zip((self.sparse, self.other), parts_BHNF, strict=True)
                if heads is not None
            ],
            1,
        )

    def flops(self, length: int) -> int:
        """Multiplications and additions of a forward pass over `length` tokens, as the paper counts them.

        A dense head: 8 C D N + 4 D N^2; a local one: 8 C D N + 8 D N w; a sparse one: 8 C D k + 4 D k^2, and for
        the router 2 C N + D k.
        """
        C, D, N, k = self.dim, self.head_dim, length, budget(length, self.sparsity)
        sparse = 8 * C * D * k + 4 * D * k * k
        if self.sparse is not None and self.sparse.router is not None:
            sparse += 2 * C * N + D * k
        seen = N if self.other is None or self.other.window is None else min(N, 2 * self.other.window)
        return self.num_sparse_heads * sparse + self.num_other_heads * (8 * C * D * N + 4 * D * N * seen)

    def cached_pairs(self, length: int) -> int:
        """Key-value pairs kept for `length` tokens: k for a sparse head, N for a dense one, 2 w for a local one."""
        k = max(length // self.sparsity, 2)
        seen = length if self.other is None or self.other.window is None else min(length, 2 * self.other.window)
        return self.num_sparse_heads * k + self.num_other_heads * seen

    def extra_repr(self) -> str:
        return (
            f"{self.num_sparse_heads} sparse heads, {self.num_other_heads} other, sparsity={self.sparsity}, "
            f"causal={self.causal}"
        )

    def _real_tokens(self, x_BNC: Tensor, mask: GivenMask, start: int) -> Tensor | None:
        if x_BNC.ndim != 3 or x_BNC.shape[-1] != self.dim:
            raise ValueError(f"x must be (batch, tokens, {self.dim}), got {tuple(x_BNC.shape)}")
        B, N = x_BNC.shape[:2]
        pattern = Pattern.of(mask, B, N, start + N, causal=self.causal, offset=start)
        return pattern.only(("padding",), "MoSA").real_keys(B)
