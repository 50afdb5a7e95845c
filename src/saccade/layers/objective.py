"""What an objective returns: the loss, and the terms that it is made of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Objective(NamedTuple):
    """A loss to be minimised.

    Attributes:
        loss: a scalar, the weighted sum of the terms.
        terms: scalars by name, without their weights.
    """

    loss: Tensor
    terms: dict[str, Tensor]
