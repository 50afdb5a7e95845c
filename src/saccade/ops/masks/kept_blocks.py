"""Masks of kept blocks: the base of `masks.blocks`, and of those whose blocks are not cut from the tokens in order.

Shape letters: B batch, H heads, n blocks of queries, m blocks of keys.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from saccade.ops.masks.block_states import PARTIAL, row_of, size_pair
from saccade.ops.masks.mask import Mask


@dataclass(frozen=True, eq=False)
class KeptBlocks(Mask):
    """Who attends to whom where blocks are kept; a mechanism says which block a token is in, and what else is seen.

    A subclass gives `allowed`, and may have further tensors as fields; as a dataclass it needs `repr=False`.

    Attributes:
        keep_BHnm: the blocks kept.
        block_q, block_k: tokens per block.
    """

    keep_BHnm: Tensor
    block_q: int
    block_k: int

    @property
    def batch(self) -> int:
        return self.keep_BHnm.shape[0]

    @property
    def heads(self) -> int:
        return self.keep_BHnm.shape[1]

    def tensors(self) -> list[Tensor]:
        return list(self._tensors().values())

    def to(self, device: torch.device | str) -> Mask:
        moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return replace(self, **moved)

    def kept(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """Whether the block of the q-th query and the k-th key is kept; the last blocks go on without end."""
        n, m = self.keep_BHnm.shape[2:]
        b, h = row_of(b, self.batch), row_of(h, self.heads)
        return self.keep_BHnm[b, h, (q // self.block_q).clamp(max=n - 1), (k // self.block_k).clamp(max=m - 1)]

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """All partial: these blocks are none of the tokens' own."""
        block_q, block_k = size_pair(block_size, "block_size")
        return torch.full((1, 1, -(-n // block_q), -(-m // block_k)), PARTIAL, dtype=torch.int8, device=device)

    def __repr__(self) -> str:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(self).__name__).lower()
        return f"{name}({float(self.keep_BHnm.float().mean()):.0%} of the blocks kept)"

    def _tensors(self) -> dict[str, Tensor]:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}
