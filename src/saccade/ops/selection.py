"""Choosing blocks without training: what block means say about which (query block, key block) pairs matter.

    xbar_i   = mean of x over block i
    P        = softmax_j(scale <qbar_i, kbar_j>)  over the candidate blocks j
    row i    : the blocks in falling order of P until their sum reaches p, at least so many of them

The pieces that training-free block-sparse mechanisms share; each says in its own room how it puts them together. All
work on blocks: nothing here has the size N x M of token pairs, and nothing loops over heads.

Shape letters: B batch, H heads, N tokens, D head dim; n, m blocks of queries and keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import working_dtype
from saccade.ops.export import exporting

__all__ = ["PerHead", "block_causal", "block_sparsity", "one_per_head", "own_blocks", "pool_blocks", "top_blocks"]

#: a threshold for all heads, or one per query head
PerHead = float | Tensor | Sequence[float]


def pool_blocks(
    x_BHND: Tensor,
    block_size: int,
    *,
    mode: Literal["mean", "max"] = "mean",
    tail: Literal["real", "zeros"] = "real",
    valid_BN: Tensor | None = None,
) -> Tensor:
    """One vector per block of tokens: (B, H, ceil(N / block_size), D), float32 (float64 for double).

    Args:
        mode: mean or largest entry.
        tail: a mean is taken over a block's "real" tokens, or, with "zeros", over `block_size` rows of which the
            missing ones are 0. A maximum is always over real tokens.
        valid_BN: bool (B or 1, N), True = real token; where None all are. A block without real tokens gives zeros.

    Raises:
        ValueError: if `block_size` is below 1 or `mode` or `tail` unknown.

    >>> pool_blocks(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), 2).flatten().tolist()
    [2.0, 5.0]
    >>> pool_blocks(torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1), 2, tail="zeros").flatten().tolist()
    [2.0, 2.5]
    """
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {block_size}")
    if mode not in ("mean", "max") or tail not in ("real", "zeros"):
        raise ValueError(f"mode must be 'mean' or 'max' and tail 'real' or 'zeros', got {mode!r} and {tail!r}")
    N = x_BHND.shape[2]
    wide = working_dtype(x_BHND.dtype)
    empty = 0.0 if mode == "mean" else float("-inf")
    if valid_BN is not None:
        x_BHND = x_BHND.masked_fill(~valid_BN[:, None, :, None], empty)
    whole = N // block_size * block_size
    # whole blocks are read in place; only a short last one is filled up
    parts = [x_BHND[:, :, :whole].unflatten(2, (-1, block_size))] if whole else []
    if whole < N:
        parts.append(F.pad(x_BHND[:, :, whole:], (0, 0, 0, -N % block_size), value=empty)[:, :, None])
    if not parts:
        return x_BHND.new_zeros(*x_BHND.shape[:2], 0, x_BHND.shape[3], dtype=wide)
    if mode == "max":
        pooled = torch.cat([part.amax(3).to(wide) for part in parts], 2)
        return pooled if valid_BN is None else pooled.masked_fill(pooled == empty, 0.0)
    pooled = torch.cat([part.sum(3, dtype=wide) for part in parts], 2)
    if tail == "zeros":
        return pooled / block_size
    if valid_BN is None:
        counts = torch.arange(0, N, block_size, device=pooled.device).neg().add(N).clamp(max=block_size)
        return pooled / counts[:, None]
    counts_Bn = F.pad(valid_BN, (0, -N % block_size)).unflatten(1, (-1, block_size)).sum(2)
    return pooled / counts_Bn[:, None, :, None].clamp(min=1)


def one_per_head(
    value: PerHead,
    name: str,
    heads: int,
    device: torch.device,
    low: float = -math.inf,
    high: float = math.inf,
) -> Tensor:
    """One threshold per head, (H,) float32.

    Args:
        value: one for all, or one of each.
        name: of the argument, for messages.
        heads: H.
        device: where it is wanted.
        low, high: bounds of numbers; a tensor's are not checked, looking into it would wait for the device.

    Raises:
        ValueError: if a number is out of bounds, or there are not as many as heads.
    """
    numbers = [] if isinstance(value, Tensor) else value if isinstance(value, (tuple, list)) else [value]
    if not all(isinstance(number, (int, float)) and low <= number <= high for number in numbers):
        span = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} must be a number {span}, got {value}")
    per_head = torch.as_tensor(value, dtype=torch.float32, device=device)
    if per_head.ndim > 1 or (per_head.ndim == 1 and per_head.shape[0] != heads):
        raise ValueError(f"{name} must be one number or one per head ({heads}), got shape {tuple(per_head.shape)}")
    return per_head.expand(heads)


def top_blocks(
    share_BHnm: Tensor,
    *,
    p: float | Tensor | None = None,
    crossing: bool = False,
    at_least: int | Tensor = 1,
) -> Tensor:
    """The blocks of greatest share in each row: bool, of the shares' shape.

    In falling order, c_1 <= c_2 <= ... being the sums so far, the first `max(#{c <= p}, at_least)` blocks are kept;
    with `crossing` one more than #{c <= p}, so that what is kept sums to more than p. Ties are broken in favour of
    earlier blocks. Blocks that are no candidates have a share of 0; with a large `p` or `at_least` they come in too: a
    caller with candidates takes the intersection.

    Args:
        share_BHnm: shares, rows summing to 1 (NaN counts as larger than all).
        p: share to be kept, a number or (..., 1, 1) or (..., n, 1); None for `at_least` alone.
        at_least: blocks per row, a number or a tensor as `p`.

    >>> top_blocks(torch.tensor([[0.5, 0.1, 0.3, 0.1]]), p=0.7).int().tolist()
    [[1, 0, 0, 0]]
    >>> top_blocks(torch.tensor([[0.5, 0.1, 0.3, 0.1]]), p=0.7, crossing=True).int().tolist()
    [[1, 0, 1, 0]]
    """
    if not share_BHnm.numel():
        return torch.zeros_like(share_BHnm, dtype=torch.bool)
    if exporting():  # no runtime has a sort that is said to be stable; their top k is
        sorted_BHnm, order_BHnm = share_BHnm.topk(share_BHnm.shape[-1], -1)
    else:
        sorted_BHnm, order_BHnm = share_BHnm.sort(dim=-1, descending=True, stable=True)
    count: int | Tensor = at_least
    if p is not None:
        count = (sorted_BHnm.cumsum(-1) <= p).sum(-1, keepdim=True) + int(crossing)
        count = torch.maximum(count, torch.as_tensor(at_least, device=count.device))
    first = torch.arange(share_BHnm.shape[-1], device=share_BHnm.device) < count
    return torch.zeros_like(share_BHnm, dtype=torch.bool).scatter_(-1, order_BHnm, first.expand_as(order_BHnm))


def block_causal(
    n: int, m: int, block_q: int, block_k: int, *, offset: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """(n, m): the key block begins no later than the query block ends, query 0 standing at key `offset`.

    >>> block_causal(2, 4, 4, 2).int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 1]]
    """
    end_n = (torch.arange(n, device=device) + 1) * block_q + offset
    return torch.arange(m, device=device) * block_k < end_n[:, None]


def own_blocks(
    n: int, m: int, block_q: int, block_k: int, *, offset: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """(n, m): the key block holds a position of the query block; the diagonal, where blocks have one size.

    >>> own_blocks(2, 4, 4, 2).int().tolist()
    [[1, 1, 0, 0], [0, 0, 1, 1]]
    """
    past = block_causal(n, m, block_q, block_k, offset=offset, device=device)
    begin_n = torch.arange(n, device=device) * block_q + offset
    return past & ((torch.arange(m, device=device) + 1) * block_k > begin_n[:, None])


def leading_blocks(sinks: int, block_size: int) -> int:
    """How many blocks the first `sinks` tokens lie in.

    Args:
        sinks: tokens.
        block_size: of a block.

    Raises:
        ValueError: if `sinks` is no number of tokens, 0 or more.

    >>> [leading_blocks(sinks, 64) for sinks in (0, 1, 64, 65)]
    [0, 1, 1, 2]
    """
    if not isinstance(sinks, int) or sinks < 0:
        raise ValueError(f"sinks must be a number of tokens, 0 or more, got {sinks!r}")
    return -(-sinks // block_size)


def block_sparsity(keep_BHnm: Tensor, candidates_nm: Tensor | None = None) -> Tensor:
    """Share of the (candidate) blocks that are left out, (B, H).

    >>> block_sparsity(torch.tensor([[[[1, 0], [0, 1]]]])).item()
    0.5
    """
    every = keep_BHnm.shape[2] * keep_BHnm.shape[3] if candidates_nm is None else candidates_nm.sum()
    return 1 - keep_BHnm.sum((2, 3)) / every


def running_max(x: Tensor, dim: int) -> Tensor:
    """`cummax` without its index, in log2(n) passes that use all threads and wide registers; it uses neither."""
    n, step = x.shape[dim], 1
    while step < n:
        later = torch.maximum(x.narrow(dim, step, n - step), x.narrow(dim, 0, n - step))
        x, step = torch.cat([x.narrow(dim, 0, step), later], dim), 2 * step
    return x
