"""A set of any size kept as a few weighted means, to which more of it is added batch by batch.

Each item n spreads a weight of 1 over M centres, A_mn = softmax_m; what is kept of the set is

    a_m = sum_n A_mn,     F_m = sum_n A_mn v_n / max(a_m, least),     least = 0 or 1
    (a, F) and (a', F') make  (a + a', (a F + a' F') / (a + a'))

so that memory does not grow with the set, and the order of the batches does not matter. With least = 1 a centre that
has less than one item's weight is not made up to a mean. Both are kept in float32 at least.

Shape letters: B batch, M centres, N items, C channels of values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Summary(NamedTuple):
    """What is kept of a set.

    Attributes:
        mass: a, (B, M, 1).
        means: F of each of several kinds of values, (B, M, C) each.
    """

    mass: Tensor
    means: tuple[Tensor, ...]


def summarise(share_BMN: Tensor, values: Sequence[Tensor], *, least: float = 0.0) -> Summary:
    """The summary of a batch of items.

    Args:
        share_BMN: A; what is padding has a share of 0.
        values: (B, N, C) each.
        least: of the divisor, through which no gradient goes.

    >>> mass, (mean,) = summarise(torch.tensor([[[0.5, 1.0]]]), [torch.tensor([[[3.0], [6.0]]])])
    >>> mass.item(), mean.item()
    (1.5, 5.0)
    """
    wide = torch.promote_types(share_BMN.dtype, torch.float32)
    share_BMN = share_BMN.to(wide)
    mass_BM1 = share_BMN.sum(-1, keepdim=True)
    weight_BMN = share_BMN / mass_BM1.detach().clamp(min=least or torch.finfo(wide).tiny)
    return Summary(mass_BM1, tuple((weight_BMN @ value_BNC.to(wide)).to(wide) for value_BNC in values))


def merged(first: Summary, second: Summary, *, least: float = 1e-6) -> Summary:
    """The summary of both sets.

    Args:
        first, second: of the same centres and kinds of values.
        least: of the divisor.

    Raises:
        ValueError: if their shapes differ.
    """
    shapes = [[tuple(x.shape) for x in (summary.mass, *summary.means)] for summary in (first, second)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"summaries must be of one shape, got {shapes[0]} and {shapes[1]}")
    mass_BM1 = first.mass + second.mass
    divisor_BM1 = mass_BM1.clamp(min=least)
    means = (
        (first.mass * mean_BMC + second.mass * other_BMC) / divisor_BM1
        for mean_BMC, other_BMC in zip(first.means, second.means)
    )
    return Summary(mass_BM1, tuple(means))
