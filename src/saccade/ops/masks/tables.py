"""Masks that are written down in a tensor: by blocks, or pair by pair.

Shape letters: B batch, H heads, N queries, M keys; n, m blocks of queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from saccade.ops.masks.block_states import FULL, as_states, block_sums, edges, known_true, row_of, size_pair
from saccade.ops.masks.kept_blocks import KeptBlocks
from saccade.ops.masks.mask import Mask
from saccade.ops.masks.runs import Runs, runs_of, shared


@dataclass(frozen=True, eq=False)
class Blocks(KeptBlocks):
    """Pairs in the blocks kept, which are cut from the tokens in their order."""

    def check(self, n: int, m: int) -> None:
        need = (ceil(n / self.block_q), ceil(m / self.block_k))
        if tuple(self.keep_BHnm.shape[2:]) != need:
            raise ValueError(
                f"{n} queries and {m} keys make {need[0]} x {need[1]} blocks of {self.block_q} x {self.block_k}, "
                f"got a block mask of {self.keep_BHnm.shape[2]} x {self.keep_BHnm.shape[3]}"
            )

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h = row_of(b, self.batch), row_of(h, self.heads)
        return self.keep_BHnm[b, h, q // self.block_q, k // self.block_k]

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = size_pair(block_size, "block_size")
        keep = self.keep_BHnm.to(device)
        if (block_q, block_k) == (self.block_q, self.block_k):
            return keep.to(torch.int8) * FULL
        # a summed-area table counts the kept blocks that each asked-for block touches
        first_q, last_q = (edge // self.block_q for edge in edges(n, block_q, device))
        first_k, last_k = (edge // self.block_k for edge in edges(m, block_k, device))
        table = torch.nn.functional.pad(keep.to(torch.int64).cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        rows_low, rows_high = table[..., first_q, :], table[..., last_q + 1, :]
        rows = rows_high - rows_low
        count = rows[..., last_k + 1] - rows[..., first_k]
        area = (last_q - first_q + 1)[:, None] * (last_k - first_k + 1)
        return as_states(count > 0, count == area)

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        if queries.start % self.block_q or keys.start % self.block_k:
            return super().part(queries, keys, n, m)
        rows = slice(queries.start // self.block_q, ceil(queries.stop / self.block_q))
        columns = slice(keys.start // self.block_k, ceil(keys.stop / self.block_k))
        return Blocks(self.keep_BHnm[:, :, rows, columns], self.block_q, self.block_k)

    def reach(self, queries: range, n: int, m: int) -> Runs:
        rows = slice(queries.start // self.block_q, ceil(queries.stop / self.block_q))
        seen = self.keep_BHnm[:, :, rows].flatten(0, 2).any(0) if queries else self.keep_BHnm.new_zeros(0)
        return shared([range(run.start * self.block_k, run.stop * self.block_k) for run in runs_of(seen)], [range(m)])

    def hides_nothing(self, n: int, m: int) -> bool:
        return known_true(self.keep_BHnm)

    def __repr__(self) -> str:
        share = self.keep_BHnm.float().mean().item() if self.keep_BHnm.numel() else 0.0
        return f"blocks({share:.0%} of {self.keep_BHnm.shape[2]} x {self.keep_BHnm.shape[3]} kept)"


def blocks(keep_BHnm: Tensor, block_size: int | Sequence[int]) -> Mask:
    """Pairs in the kept blocks.

    Args:
        keep_BHnm: bool (B, H, n, m), True = the block is attended; B and H may be 1. (n, m) alone is for all.
        block_size: tokens per block, an int or (query, key).

    Raises:
        ValueError: if `keep_BHnm` is no such tensor, or a block size is not positive.
    """
    if keep_BHnm.dtype != torch.bool or keep_BHnm.ndim not in (2, 4):
        raise ValueError(
            f"keep must be a bool tensor (B, H, n, m), got {keep_BHnm.dtype} of shape {tuple(keep_BHnm.shape)}"
        )
    keep = keep_BHnm if keep_BHnm.ndim == 4 else keep_BHnm[None, None]
    return Blocks(keep, *size_pair(block_size, "block_size"))


@dataclass(frozen=True, eq=False)
class Dense(Mask):
    """A bool tensor as a mask.

    Attributes:
        mask_BHNM: bool; every axis may be 1, for all.
    """

    mask_BHNM: Tensor

    @property
    def batch(self) -> int:
        return self.mask_BHNM.shape[0]

    @property
    def heads(self) -> int:
        return self.mask_BHNM.shape[1]

    def check(self, n: int, m: int) -> None:
        shape = self.mask_BHNM.shape
        if shape[2] not in (1, n) or shape[3] not in (1, m):
            raise ValueError(f"mask must broadcast to (..., {n}, {m}), got shape {tuple(shape)}")

    def tensors(self) -> list[Tensor]:
        return [self.mask_BHNM]

    def to(self, device: torch.device | str) -> Mask:
        return Dense(self.mask_BHNM.to(device))

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h, q, k = (row_of(i, rows) for i, rows in zip((b, h, q, k), self.mask_BHNM.shape))
        return self.mask_BHNM[b, h, q, k]

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = size_pair(block_size, "block_size")
        count = self.mask_BHNM.to(device).to(torch.int32)
        ones_q = block_sums(torch.ones(n, dtype=torch.int32, device=device), block_q)
        ones_k = block_sums(torch.ones(m, dtype=torch.int32, device=device), block_k)
        # an axis of length 1 stands for all: it is multiplied, never expanded
        count = block_sums(count, block_k) if count.shape[3] == m else count * ones_k
        count = block_sums(count.mT, block_q).mT if count.shape[2] == n else count * ones_q[:, None]
        return as_states(count > 0, count == ones_q[:, None] * ones_k)

    def dense(self, n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
        self.check(n, m)
        mask = self.mask_BHNM.to(device)
        return mask if mask.shape[2:] == (n, m) else mask.expand(-1, -1, n, m)

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        mask = self.mask_BHNM if self.mask_BHNM.shape[2] == 1 else self.mask_BHNM[:, :, queries.start : queries.stop]
        return Dense(mask if mask.shape[3] == 1 else mask[..., keys.start : keys.stop])

    def reach(self, queries: range, n: int, m: int) -> Runs:
        if not queries:
            return []
        part = self.part(queries, range(m), n, m)
        assert isinstance(part, Dense)
        return runs_of(part.mask_BHNM.flatten(0, 2).any(0).expand(m))

    def hides_nothing(self, n: int, m: int) -> bool:
        return known_true(self.mask_BHNM)

    def __repr__(self) -> str:
        return f"dense{tuple(self.mask_BHNM.shape)}"


def dense(mask: Tensor) -> Mask:
    """A bool tensor that broadcasts to (B, H, N, M), True = may attend, so that it can be combined with other masks.

    Args:
        mask: bool, of two to four axes; those that are missing are B and H.

    Raises:
        ValueError: if it is no such tensor.
    """
    if mask.dtype != torch.bool or mask.ndim > 4 or mask.ndim < 2:
        raise ValueError(f"mask must be a bool tensor of 2 to 4 axes, got {mask.dtype} of shape {tuple(mask.shape)}")
    return Dense(mask[(None,) * (4 - mask.ndim)])
