"""The heads beside the sparse ones, dense or in a window, and the keys that a window remembers.

Shape letters: B batch, N tokens, M tokens so far, C channels, H other heads, D head dim, F width of given values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from saccade.layers.cache import KVCache
from saccade.ops import masks
from saccade.ops.attend import attend
from saccade.ops.masks import Mask
from saccade.ops.rope import rotate


class OtherHeads(nn.Module):
    """H dense heads, or local ones with a window: x (B, N, C) -> (B, N, C).

    Args:
        dim, num_heads, head_dim: C, H and D.
        causal: no token sees a later one.
        window: tokens of a bucket of local heads, which rotate the whole head with base 10000; None: dense.
        rotate_fraction, rope_base: `MoSA`'s, of dense heads.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        head_dim: int,
        *,
        causal: bool = True,
        window: int | None = None,
        rotate_fraction: float = 0.5,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.causal, self.window = num_heads, head_dim, causal, window
        self.rope_base = rope_base if window is None else 10000.0
        self.rotated = 2 * math.floor((rotate_fraction if window is None else 1.0) * head_dim / 2)
        self.qkv = nn.Linear(dim, 3 * head_dim * num_heads, bias=False)
        self.out = nn.Linear(num_heads * head_dim, dim, bias=False)

    def forward(
        self, x_BNC: Tensor, real_BM: Tensor | None = None, cache: KVCache | RecentKeys | None = None
    ) -> Tensor:
        start = 0 if cache is None else cache.length
        q_BHND, k_BHMD, v_BHMD = self._project(x_BNC, start)
        if cache is not None:
            k_BHMD, v_BHMD = cache.append(k_BHMD, v_BHMD)
            forgotten = cache.length - k_BHMD.shape[2]
            start -= forgotten
            real_BM = None if real_BM is None else real_BM[:, forgotten:]
        out_BHND = attend(q_BHND, k_BHMD, v_BHMD, mask=self._mask(q_BHND, k_BHMD, real_BM, start))
        return self.out(out_BHND.transpose(1, 2).flatten(2))

    def mix(self, x_BNC: Tensor, values_BHNF: Tensor, real_BN: Tensor | None = None) -> Tensor:
        """The heads' weights on `x_BNC`, applied to given values; (B, H, N, F)."""
        q_BHND, k_BHND, _ = self._project(x_BNC, 0)
        return attend(q_BHND, k_BHND, values_BHNF, mask=self._mask(q_BHND, k_BHND, real_BN, 0))

    def _project(self, x_BNC: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        # head by head [Q, K, V], the authors' layout
        qkv_BHND = self.qkv(x_BNC).unflatten(-1, (self.num_heads, 3 * self.head_dim)).transpose(1, 2)
        q_BHND, k_BHND, v_BHND = qkv_BHND.chunk(3, -1)
        position_N = torch.arange(start, start + x_BNC.shape[1], device=x_BNC.device)
        q_BHND, k_BHND = (rotate(t, position_N, base=self.rope_base, channels=self.rotated) for t in (q_BHND, k_BHND))
        return q_BHND, k_BHND, v_BHND

    def _mask(self, q_BHND: Tensor, k_BHMD: Tensor, real_BM: Tensor | None, start: int) -> Mask | None:
        mask = masks.causal(start) if self.causal else None
        if mask is not None and self.window is not None:
            mask = mask & _buckets(q_BHND.shape[2], k_BHMD.shape[2], self.window, start, q_BHND.device)
        if real_BM is not None:
            mask = masks.padding(real_BM) if mask is None else mask & masks.padding(real_BM)
        return mask


def _buckets(queries: int, keys: int, window: int, start: int, device: torch.device) -> Mask:
    """A bucket of `window` tokens sees itself and the one before (with the causal mask); query 0 stands at `start`."""
    if start % window == 0:
        query = torch.arange(start // window, start // window + math.ceil(queries / window), device=device)
        key = torch.arange(math.ceil(keys / window), device=device)
        return masks.blocks((query[:, None] - key <= 1), window)
    query = (start + torch.arange(queries, device=device)) // window
    key = torch.arange(keys, device=device) // window
    return masks.dense((query[:, None] - key <= 1)[None, None])


class RecentKeys:
    """Keys and values that local heads may still see: of the bucket of the next query and the one before.

    Attributes:
        length: tokens seen.
    """

    def __init__(self, window: int) -> None:
        self.window, self.length, self._forgotten = window, 0, 0
        self._held: tuple[Tensor, Tensor] | None = None

    def append(self, k_BHND: Tensor, v_BHND: Tensor) -> tuple[Tensor, Tensor]:
        """Add N tokens; returns the keys and values from the first that the new tokens see to the last."""
        new = (k_BHND.detach(), v_BHND.detach())
        if self._held is not None:
            first = max(0, (self.length // self.window - 1) * self.window) - self._forgotten
            old = self._held
            new = (torch.cat([old[0][:, :, first:], new[0]], 2), torch.cat([old[1][:, :, first:], new[1]], 2))
            self._forgotten += first
        self._held = new
        self.length += k_BHND.shape[2]
        return new

    @property
    def nbytes(self) -> int:
        return 0 if self._held is None else sum(part.numel() * part.element_size() for part in self._held)
