"""Any function of a pair as a mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from saccade.ops.masks.block_states import as_states, block_sums, row_of, size_pair
from saccade.ops.masks.mask import Mask
from saccade.ops.pairs import for_pairs, is_scalar_only

#: pairs for which a mask function is asked at a time
_PAIRS_AT_A_TIME = 2**22


@dataclass(frozen=True, eq=False)
class Function(Mask):
    """Pairs for which a function says yes.

    Attributes:
        mask_mod: the function, (b, h, q, k) -> bool.
        rows, planes: batch rows and heads that it tells apart; 1 where it ignores them.
    """

    mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    rows: int = 1
    planes: int = 1
    _maps: dict[tuple[int, int, int, int], Tensor] = field(default_factory=dict, repr=False)
    _scalars: list[bool] = field(default_factory=list, repr=False)

    @property
    def batch(self) -> int:
        return self.rows

    @property
    def heads(self) -> int:
        return self.planes

    def allowed(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        b, h = row_of(b, self.rows), row_of(h, self.planes)
        if torch.compiler.is_compiling():  # looking at values would cut the graph
            return for_pairs(self.mask_mod, b, h, q, k).bool()
        if not self._scalars:
            self._scalars.append(is_scalar_only(self.mask_mod, b, h, q, k))
        return for_pairs(self.mask_mod, b, h, q, k, scalars=self._scalars[0]).bool()

    def block_map(self, n: int, m: int, block_size: int | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Exact, by asking for every pair once, some blocks of queries at a time; the answer is kept."""
        block_q, block_k = size_pair(block_size, "block_size")
        key = (n, m, block_q, block_k)
        if key not in self._maps:
            b = torch.arange(self.rows, device=device)[:, None, None, None]
            h = torch.arange(self.planes, device=device)[:, None, None]
            k = torch.arange(m, device=device)
            ones_k = block_sums(torch.ones(m, dtype=torch.int32, device=device), block_k)
            step = block_q * max(1, _PAIRS_AT_A_TIME // max(1, self.rows * self.planes * block_q * m))
            bands = []
            for first in range(0, n, step):
                q = torch.arange(first, min(first + step, n), device=device)[:, None]
                count = block_sums(block_sums(self.allowed(b, h, q, k).to(torch.int32), block_k).mT, block_q).mT
                ones_q = block_sums(torch.ones(q.shape[0], dtype=torch.int32, device=device), block_q)
                bands.append(as_states(count > 0, count == ones_q[:, None] * ones_k))
            empty = torch.zeros(self.rows, self.planes, 0, ceil(m / block_k), dtype=torch.int8, device=device)
            self._maps[key] = torch.cat(bands or [empty], -2)
        return self._maps[key].to(device)

    def part(self, queries: range, keys: range, n: int, m: int) -> Mask:
        def moved(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return self.mask_mod(b, h, q + queries.start, k + keys.start)

        return Function(moved, self.rows, self.planes)

    def __repr__(self) -> str:
        return f"function({getattr(self.mask_mod, '__name__', 'mask_mod')})"


def function(mask_mod: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], *, batch: int = 1, heads: int = 1) -> Mask:
    """FlexAttention's `mask_mod(b, h, q_idx, kv_idx) -> bool` as a mask.

    It is asked with index tensors that broadcast where that gives the same as one pair at a time, else it is mapped.
    Its block structure is found by asking for each pair once (N M evaluations, never held at once) and is kept with the
    mask, so make a mask once and use it in every layer; tensors that the function captures must not change afterwards.

    Args:
        mask_mod: the function.
        batch, heads: how many rows and heads the function tells apart; 1 where it ignores `b` or `h`.

    Raises:
        ValueError: if `batch` or `heads` is below 1.

    >>> even = function(lambda b, h, q, k: (q - k) % 2 == 0)
    >>> from saccade.ops.masks import causal
    >>> (even & causal()).dense(4, 4)[0, 0, 3].tolist()
    [False, True, False, True]
    """
    if batch < 1 or heads < 1:
        raise ValueError(f"batch and heads must be positive, got {batch} and {heads}")
    return Function(mask_mod, batch, heads)
