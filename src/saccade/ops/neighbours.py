"""What looks at a bounded number of tokens before and after each: convolutions along the sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from saccade.ops.sharding import in_parts

__all__ = ["with_neighbours"]


@in_parts
def with_neighbours(
    function: Callable[[Tensor], Tensor], x: Tensor, before: int, after: int = 0, dim: int = 1
) -> Tensor:
    """A function of each token and its neighbours, on a sequence with zeros at its ends; on one in parts
    (`saccade.parallel`) neighbours that another rank holds are fetched from there.

        y = function([0] * before + x + [0] * after)

    Args:
        function: gives n tokens for `before` + n + `after`, as a convolution without padding does.
        x: tokens on axis `dim`, not the first.
        before, after: how many neighbours.
        dim: the axis of tokens, of x and of what the function gives.

    Raises:
        ValueError: if a number is negative, or the function gives another number of tokens.

    >>> import torch
    >>> x, kernel = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[1.0, 1.0, 1.0]]])
    >>> with_neighbours(lambda x: torch.nn.functional.conv1d(x, kernel), x, before=2, dim=2).tolist()
    [[[1.0, 3.0, 6.0, 9.0]]]
    """
    if before < 0 or after < 0:
        raise ValueError(f"before and after must be numbers of tokens, 0 or more, got {before} and {after}")
    dim = dim % x.ndim
    found = function(F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (before, after)))
    if found.shape[dim] != x.shape[dim]:
        raise ValueError(expected(x.shape[dim], found.shape[dim]))
    return found


def expected(tokens: int, got: int) -> str:
    """What is wrong with a function that gives another number of tokens.

    Args:
        tokens: of which it was given those and their neighbours.
        got: how many it gave.
    """
    return f"the function must give {tokens} tokens for those and their neighbours, got {got}"
