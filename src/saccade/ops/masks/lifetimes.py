"""Keys that are seen for a time: from the query at which they are born to the last one that sees them.

Shape letters: B batch, K key heads, M keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from saccade.ops.masks.block_states import as_states, block_range, edges, size_pair
from saccade.ops.masks.mask import Mask

#: the end of a life that has none yet
FOREVER = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Lifetimes(Mask):
    """Key j is seen by the queries from `born` to `until`, inclusive; query 0 is number `offset`.

    Attributes:
        born_BKM, until_BKM: integers per key head.
        group: query heads that share a key head.
        offset: number of query 0, the tokens before it.
    """

    born_BKM: Tensor
    until_BKM: Tensor
    group: int = 1
    offset: int = 0

    @property
    def batch(self) -> int:
        return self.until_BKM.shape[0]

    @property
    def heads(self) -> int:
        return self.until_BKM.shape[1] * self.group

    def check(self, n: int, m: int) -> None:
        if self.until_BKM.shape[2] != m:
            raise ValueError(f"the lifetimes are those of {self.until_BKM.shape[2]} keys, got {m}")

    def tensors(self) -> list[Tensor]:
        return [self.born_BKM, self.until_BKM]

    def to(self, device: torch.device | str) -> Mask:
        return Lifetimes(self.born_BKM.to(device), self.until_BKM.to(device), self.group, self.offset)

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        row = torch.zeros_like(b) if self.batch == 1 else b
        head = h // self.group if self.until_BKM.shape[1] > 1 else torch.zeros_like(h)
        time = q + self.offset
        return (time >= self.born_BKM[row, head, k]) & (time <= self.until_BKM[row, head, k])

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = size_pair(block_size, "block_size")
        first_q, last_q = (edge[:, None] + self.offset for edge in edges(n, block_q, device))
        low_born, high_born = block_range(self.born_BKM.to(device), block_k)
        low_until, high_until = block_range(self.until_BKM.to(device), block_k)
        some = (last_q >= low_born[:, :, None]) & (first_q <= high_until[:, :, None])
        every = (first_q >= high_born[:, :, None]) & (last_q <= low_until[:, :, None])
        return as_states(some, every & some).repeat_interleave(self.group, 1)

    def key_limits(self) -> tuple[Tensor, Tensor]:
        return self.born_BKM - self.offset, self.until_BKM - self.offset

    def __repr__(self) -> str:
        return f"lifetimes({self.heads} heads, {self.until_BKM.shape[2]} keys)"
