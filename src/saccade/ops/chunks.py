"""Attention inside chunks of a sequence, each for itself.

Shape letters: B batch, H heads, N tokens, n chunks, D width of queries and keys, E of values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from saccade.ops.sharding import in_parts

__all__ = ["attend_in_chunks"]


@in_parts
def attend_in_chunks(
    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    size: int,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHNE: Tensor,
    valid_BN: Tensor | None = None,
) -> Tensor:
    """What a function gives each chunk, (B, H, N, E): the whole ones as one batch, and what is left.

    Args:
        attend: the function, of queries, keys, values and which of the keys are real tokens.
        size: tokens of a chunk.
        q_BHND, k_BHND, v_BHNE: of the sequence.
        valid_BN: real tokens; all where None.
    """
    B, _, N, _ = q_BHND.shape
    whole = N // size * size

    def fold(x: Tensor) -> Tensor:
        """(B, H, n size, D) -> (B n, H, size, D)"""
        return x[:, :, :whole].unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)

    valid = None if valid_BN is None else valid_BN[:, :whole].reshape(-1, size)
    out = attend(fold(q_BHND), fold(k_BHND), fold(v_BHNE), valid)
    out = out.unflatten(0, (B, whole // size)).transpose(1, 2).flatten(2, 3)
    if whole == N:
        return out
    q, k, v = (x[:, :, whole:] for x in (q_BHND, k_BHND, v_BHNE))
    return torch.cat([out, attend(q, k, v, None if valid_BN is None else valid_BN[:, whole:])], 2)
