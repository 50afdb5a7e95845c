"""What every table of embeddings gives: vectors of ids, a penalty, and how much of it is stored.

Shape letters: B batch, F fields, K values of a field, D width, V values of all fields.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.models.click import MISSING, FieldTable, check_ids, pooled


class Table(FieldTable):
    """A table of all fields as it is (the baseline); others are made of it by `kept`, the weight that is read.

    Args:
        fields: how many values each has.
        dim: D.
    """

    def kept(self) -> Tensor:
        """The weight (V, D) as the interaction sees it."""
        return self.weight

    def penalty(self) -> Tensor | None:
        """What is added to the loss in training."""
        return None

    def stored(self) -> int:
        """How many numbers have to be kept once it is trained: those that are not 0."""
        return int((self.kept() != 0).sum())

    def forward(self, ids: Tensor, weight_VD: Tensor | None = None) -> Tensor:
        return super().forward(ids, self.kept() if weight_VD is None else weight_VD)

    def of_field(self) -> Tensor:
        """The field of each row, (V,)."""
        fields = torch.arange(len(self.fields), device=self.weight.device)
        counts = torch.tensor(self.fields, device=self.weight.device)
        return fields.repeat_interleave(counts, output_size=sum(self.fields))


class ComposedTable(nn.Module):
    """Base of the tables whose vectors are composed; a subclass gives `vectors`.

    Args:
        fields: how many values each has.
        dim: D.
    """

    def __init__(self, fields: Sequence[int], dim: int) -> None:
        super().__init__()
        self.fields, self.dim = tuple(fields), dim

    def vectors(self, ids_BF: Tensor) -> Tensor:
        """(B, F, D), of values that are all there."""
        raise NotImplementedError

    def forward(self, ids: Tensor) -> Tensor:
        """The vectors (B, F, D); of several values of a field their mean, of none zeros.

        Args:
            ids: (B, F), or (B, F, K); from 0 in each field, -1 is missing.

        Raises:
            ValueError: as `saccade.models.click.rows_of`.
        """
        check_ids(ids, self.fields)
        there = ids != MISSING
        known = ids.clamp(min=0)
        if ids.ndim == 2:
            return pooled(self.vectors(known), there)
        e_BKFD = self.vectors(known.mT.flatten(0, 1)).unflatten(0, (len(ids), -1))
        return pooled(e_BKFD.transpose(1, 2), there)

    def penalty(self) -> Tensor | None:
        """What is added to the loss in training."""
        return None

    def stored(self) -> int:
        """How many numbers have to be kept once it is trained: all."""
        return sum(p.numel() for p in self.parameters())
