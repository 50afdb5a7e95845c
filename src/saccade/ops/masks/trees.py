"""Trees of tokens behind a common beginning: each sees the beginning, its ancestors and itself.

Shape letters: N queries, T nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.masks.block_states import as_states, edges, integer, known_true, size_pair
from saccade.ops.masks.mask import Mask
from saccade.ops.trees import ancestors


@dataclass(frozen=True, eq=False)
class Tree(Mask):
    """Pairs of a token and a key that is of the beginning, or on its way from the root.

    Attributes:
        sees_NT: bool; which of the T nodes, the last keys, each query sees. The queries are the last nodes.
        prefix: keys before the nodes, which all queries see.
    """

    sees_NT: Tensor
    prefix: int

    def check(self, n: int, m: int) -> None:
        rows, nodes = self.sees_NT.shape
        if n != rows or m != self.prefix + nodes:
            raise ValueError(f"the tree is for {rows} queries and {self.prefix + nodes} keys, got {n} and {m}")

    def tensors(self) -> list[Tensor]:
        return [self.sees_NT]

    def to(self, device: torch.device | str) -> Mask:
        return Tree(self.sees_NT.to(device), self.prefix)

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < self.prefix) | self.sees_NT[q, (k - self.prefix).clamp(min=0)]

    def dense(self, n: int, m: int, device: torch.device | str = "cpu") -> Tensor:
        self.check(n, m)
        return F.pad(self.sees_NT.to(device), (self.prefix, 0), value=True)[None, None]

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        block_q, block_k = size_pair(block_size, "block_size")
        first_q, last_q = edges(n, block_q, device)
        first_k, last_k = (edge - self.prefix for edge in edges(m, block_k, device))
        # a summed-area table counts the pairs of nodes; those with a key of the beginning count as seen
        table = F.pad(self.sees_NT.to(device).to(torch.int64).cumsum(-1).cumsum(-2), (1, 0, 1, 0))
        rows = table[last_q + 1] - table[first_q]
        low, high = first_k.clamp(min=0), (last_k + 1).clamp(min=0)
        rows_q, cols_k = (last_q - first_q + 1)[:, None], last_k - first_k + 1
        count = rows[:, high] - rows[:, low] + rows_q * (cols_k - (high - low))
        return as_states(count > 0, count == rows_q * cols_k)[None, None]

    def hides_nothing(self, n: int, m: int) -> bool:
        return known_true(self.sees_NT)

    def __repr__(self) -> str:
        return f"tree({self.sees_NT.shape[1]} nodes behind {self.prefix} keys)"


def tree(parents_T: Tensor | Sequence[int], prefix: int = 0, *, queries: int | None = None) -> Mask:
    """A tree of tokens, as speculative decoding verifies it in one pass: each sees its ancestors and what is before.

    Args:
        parents_T: the number of each node's parent, before it; -1 of a root.
        prefix: keys before the nodes.
        queries: how many of the last nodes ask; all where None.

    Raises:
        ValueError: if a parent does not come before its node, or a number is out of range.

    >>> print(tree([-1, 0, 0, 1], prefix=2).picture(4, 6))
    ###...
    ####..
    ###.#.
    ####.#
    """
    prefix = integer(prefix, "prefix")
    sees_TT = ancestors(torch.as_tensor(parents_T))
    nodes = len(sees_TT)
    asking = nodes if queries is None else integer(queries, "queries")
    if prefix < 0 or not 0 <= asking <= nodes:
        raise ValueError(f"prefix and queries must be from 0, queries at most {nodes}, got {prefix} and {asking}")
    return Tree(sees_TT[nodes - asking :], prefix)
