"""The front-end: tables, numbers, selection and generation before any interaction network.

Shape letters: B batch, F fields (numbers first), M numbers, D width, E what is told of pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.click import MISSING, ClickNetwork, ClickOutput, FirstOrder, Interaction, check_fields, check_ids
from saccade.models.ctr_representation_survey.composition import (
    CodebookTable,
    DeepHashTable,
    DoubleHashTable,
    HashTable,
    QuotientRemainderTable,
    TensorTrainTable,
)
from saccade.models.ctr_representation_survey.dimension import (
    AutoDimTable,
    BlockGatedTable,
    MixedTable,
    OptEmbedTable,
    OptFSTable,
    PEPTable,
    RoundedTable,
)
from saccade.models.ctr_representation_survey.generation import GENERATIONS
from saccade.models.ctr_representation_survey.numeric import AutoDis, Buckets
from saccade.models.ctr_representation_survey.selection import SELECTIONS, AdaFS, Kept
from saccade.models.ctr_representation_survey.tables import Table

TABLES: Mapping[str, Any] = MappingProxyType(
    {
        "full": Table,
        "optfs": OptFSTable,
        "optembed": OptEmbedTable,
        "pep": PEPTable,
        "dnis": BlockGatedTable,
        "int8": RoundedTable,
        "mde": MixedTable,
        "autodim": AutoDimTable,
        "hash": HashTable,
        "double-hash": DoubleHashTable,
        "quotient-remainder": QuotientRemainderTable,
        "deep-hash": DeepHashTable,
        "tensor-train": TensorTrainTable,
        "codebook": CodebookTable,
    }
)
NUMBERS: Mapping[str, Any] = MappingProxyType({"buckets": Buckets, "autodis": AutoDis})


class ClickModel(ClickNetwork):
    """Any table, numbers, selection and generation, and any interaction network behind them.

    Args:
        fields: how many values each category has.
        numeric: M, how many numbers a row has.
        dim: D.
        table: of `TABLES`: how values are represented, and which of them (optfs, optembed).
        selection: of `SELECTIONS`: which fields are, for all rows or for each; or "none".
        generation: of `GENERATIONS`: what is told of pairs; or "none".
        numbers: "scaled" (a row of the table times the number), or of `NUMBERS`.
        interaction: of `saccade.models.click.INTERACTIONS`.
        hidden, norm, drop: of its MLP.
        first_order: sum_i w[x_i] + b is added.
        gate_first_order: gates of the selection weigh it too, so that a field of gate 0 has no say left.
        table_options, selection_options, generation_options, number_options: of these modules.

    Raises:
        ValueError: if a name is unknown, an option is, or sizes are not positive.
    """

    def __init__(
        self,
        fields: Sequence[int],
        numeric: int = 0,
        dim: int = 16,
        *,
        table: str = "full",
        selection: str = "none",
        generation: str = "none",
        numbers: str = "scaled",
        interaction: str = "deepfm",
        hidden: Sequence[int] = (1024, 512, 256),
        norm: str = "none",
        drop: float = 0.0,
        first_order: bool = True,
        gate_first_order: bool = False,
        table_options: Mapping[str, Any] | None = None,
        selection_options: Mapping[str, Any] | None = None,
        generation_options: Mapping[str, Any] | None = None,
        number_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if numeric < 0 or (numbers != "scaled" and not numeric):
            raise ValueError(f"numeric must be at least 0, and positive for numbers {numbers!r}, got {numeric}")
        self.fields, self.numeric = tuple(check_fields(fields)), numeric
        self.scaled = numbers == "scaled"
        every = (1,) * numeric + self.fields
        self.table = _made("table", table, TABLES, table_options, every if self.scaled else self.fields, dim)
        self.numbers = None if self.scaled else _made("numbers", numbers, NUMBERS, number_options, numeric, dim)
        self.selection = (
            None
            if selection == "none"
            else _made("selection", selection, SELECTIONS, selection_options, len(every), dim)
        )
        given = {"numeric": numeric, **(generation_options or {})}
        self.generation = (
            None if generation == "none" else _made("generation", generation, GENERATIONS, given, every, dim)
        )
        self.first = FirstOrder(every) if first_order else None
        self.gate_first_order = gate_first_order
        extra = 0 if self.generation is None else self.generation.outputs
        self.interaction = Interaction(len(every), dim, interaction, hidden=hidden, extra=extra, norm=norm, drop=drop)

    def every(self, ids: Tensor, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        """Ids of all fields (B, F) or (B, F, K), numbers first, whose id is 0; and what they are scaled by, (B, F).

        Raises:
            ValueError: if they are not of the network's fields.
        """
        check_ids(ids, self.fields)
        if self.numeric and (numbers is None or numbers.shape != (len(ids), self.numeric)):
            came = "none" if numbers is None else tuple(numbers.shape)
            raise ValueError(f"numbers must be ({len(ids)}, {self.numeric}), got {came}")
        if numbers is not None and not self.numeric and numbers.numel():
            raise ValueError(f"the network takes no numbers, got {tuple(numbers.shape)}")
        there = (ids != MISSING).reshape(*ids.shape[:2], -1).any(2)
        if not self.numeric or numbers is None:
            return ids, there
        zeros = ids.new_zeros(len(ids), self.numeric, *ids.shape[2:])
        return torch.cat([zeros, ids], 1), torch.cat([numbers, there.to(numbers.dtype)], 1)

    def embed(self, ids: Tensor, numbers: Tensor | None = None) -> Tensor:
        """The embeddings (B, F, D), before selection; arguments and errors as for the call."""
        every, scale_BF = self.every(ids, numbers)
        if self.numbers is None:
            e_BFD = self.table(every)
            return e_BFD * scale_BF.to(e_BFD.dtype)[..., None]
        return torch.cat([self.numbers(numbers), self.table(ids)], 1)

    def logit(
        self,
        e_BFD: Tensor,
        ids: Tensor,
        numbers: Tensor | None = None,
        *,
        gates: Tensor | None = None,
        crosses: Tensor | None = None,
    ) -> Tensor:
        """(B,), of embeddings that were selected.

        Args:
            e_BFD: as the interaction network reads them.
            ids, numbers, crosses: as for the call.
            gates: (B, F), of the first-order term.
        """
        every, scale_BF = self.every(ids, numbers)
        extra = None if self.generation is None else self.generation(e_BFD, every, crosses)
        logit_B = self.interaction(e_BFD, extra)
        if self.first is None:
            return logit_B
        scale = scale_BF.to(logit_B.dtype)
        return logit_B + self.first(every, scale if gates is None else scale * gates)

    def select(self, e_BFD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embeddings times their gates, and the gates (B, F)."""
        if self.selection is None:
            return e_BFD, None
        if isinstance(self.selection, AdaFS) and self.selection.pretraining:
            return F.layer_norm(e_BFD, e_BFD.shape[-1:]), None
        gates_BF = self.selection(e_BFD)
        return e_BFD * gates_BF[..., None], gates_BF

    def forward(self, ids: Tensor, numbers: Tensor | None = None, crosses: Tensor | None = None) -> ClickOutput:
        """
        Args:
            ids: int64 (B, F), the value of each category from 0; -1 is missing. (B, F, K) where fields have several.
            numbers: (B, M).
            crosses: (B, P), the number of each pair's combination, where the network was built for given ones.

        Raises:
            ValueError: if they are not of the network's fields.
        """
        e_BFD, gates_BF = self.select(self.embed(ids, numbers))
        logits_B = self.logit(e_BFD, ids, numbers, gates=gates_BF if self.gate_first_order else None, crosses=crosses)
        return ClickOutput(logits_B, e_BFD, self.table.penalty() if self.training else None)

    def stored(self) -> int:
        """Numbers of table, pairs and numeric fields; of a full table without the fields that fixed gates drop."""
        table: int = self.table.stored()
        if isinstance(self.selection, Kept) and type(self.table) is Table:
            rows = self.selection.kept()[-len(self.table.fields) :][self.table.of_field()]
            table = int((self.table.weight[rows] != 0).sum())
        return table + sum(p.numel() for part in (self.numbers, self.generation) if part for p in part.parameters())


def _made(what: str, name: str, known: Mapping[str, Any], options: Mapping[str, Any] | None, *sizes: Any) -> Any:
    """The module of that name."""
    if name not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {name!r}")
    try:
        return known[name](*sizes, **(options or {}))
    except TypeError as error:
        raise ValueError(f"{what} {name!r}: {error}") from error
