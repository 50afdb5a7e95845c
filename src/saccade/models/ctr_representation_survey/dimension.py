"""How a feature is represented, by one table: which of its rows, and which of their numbers, are kept.

    OptFS      e_v <- e_v sigma(T c_v) / sigma(c_0);    in the end   e_v 1[c_v > 0] / sigma(c_0)
    OptEmbed   e_v <- e_v 1[|e_v|_p > t],   and in training the first c + 1 numbers alone, c drawn for row and field
    PEP        E = sign(V) max(|V| - sigma(s), 0)
    MDE        a table of width D_i = D (|v|_min / |v_i|)^alpha for each field, and a map of it to D
    AutoDim    sum_j softmax(a_i / tau)_j BN(W_j e_j), of tables of several widths
    DNIS       blocks of a field's numbers, each with a gate in [0, 1]
    int8       numbers rounded to 255 steps of each row's largest; the rounding is not seen by the gradient

Shape letters: B batch, F fields, D width, V values of all fields, W widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saccade.models.click import FieldTable, check_fields
from saccade.models.ctr_representation_survey.tables import ComposedTable, Table

#: what has a threshold of its own
THRESHOLDS = ("field", "value")
GRAINS = ("global", "field", "value", "number")


class OptFSTable(Table):
    """OptFS: a gate for each value, which becomes 0 or 1.

    Args:
        fields, dim: of the table.
        initial: c_0.
        weight_of_penalty: lambda; 1e-9 to 1e-8, mostly 2e-9.

    Attributes:
        temperature: T; the trainer raises it, see `optfs_temperature`.
        ticket: True for gates of 0 and 1.
    """

    def __init__(
        self, fields: Sequence[int], dim: int, *, initial: float = 0.5, weight_of_penalty: float = 2e-9
    ) -> None:
        super().__init__(fields, dim)
        self.initial, self.weight_of_penalty = initial, weight_of_penalty
        self.mask_logits = nn.Parameter(torch.full((len(self.weight), 1), initial))
        self.temperature, self.ticket = 1.0, False

    def gates(self) -> Tensor:
        """(V, 1)."""
        hard = (self.mask_logits > 0).to(self.mask_logits.dtype)
        soft = hard if self.ticket else (self.temperature * self.mask_logits).sigmoid()
        return soft / torch.full_like(self.mask_logits[:1], self.initial).sigmoid()

    def kept(self) -> Tensor:
        return self.weight * self.gates()

    def open(self) -> Tensor:
        """sum_v sigma(T c_v): how many values are let through."""
        return (self.temperature * self.mask_logits).sigmoid().sum()

    def penalty(self) -> Tensor | None:
        return None if self.ticket else self.weight_of_penalty * self.open()


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return (z > 0).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        size = z.abs()
        slope = torch.where(size <= 0.4, 2 - 4 * size, torch.where(size <= 1, 0.4, 0.0))
        return grad * slope.to(grad.dtype)


def binary_step(z: Tensor) -> Tensor:
    """1[z > 0], with the derivative 2 - 4|z| for |z| <= 0.4, 0.4 for |z| <= 1, 0 beyond (OptEmbed's).

    Args:
        z: any numbers.
    """
    return _Step.apply(z)


class OptEmbedTable(Table):
    """OptEmbed: rows whose norm is no larger than a threshold are dropped, and numbers behind a field's last.

    Args:
        fields, dim: of the table.
        threshold: one for each "field", or for each "value".
        p: of the norm.
        oov: what stands in place of a dropped row: "zero", or the field's own "vector".
        weight_of_penalty: alpha of alpha sum exp(-t); 1e-6 to 1e-4.
        candidate: for each field the last number that is kept, from 0, as evolution found it; in training one is drawn
            where None, otherwise all are kept.

    Raises:
        ValueError: if threshold, p or oov are unknown, or candidates are not as many as fields, below `dim`.
    """

    last: Tensor
    oov: Tensor

    def __init__(
        self,
        fields: Sequence[int],
        dim: int,
        *,
        threshold: str = "field",
        p: float = 1,
        oov: str = "zero",
        weight_of_penalty: float = 1e-5,
        candidate: Sequence[int] | None = None,
    ) -> None:
        super().__init__(fields, dim)
        if threshold not in THRESHOLDS or oov not in ("zero", "vector") or p <= 0:
            raise ValueError(
                f"threshold must be field or value, oov zero or vector, p positive; got {threshold!r}, {oov!r}, {p}"
            )
        self.per_field, self.p, self.weight_of_penalty = threshold == "field", p, weight_of_penalty
        count = len(self.fields) if self.per_field else len(self.weight)
        self.threshold = nn.Parameter(torch.zeros(count, 1))
        empty = torch.zeros(len(self.fields), dim)
        if oov == "vector":
            self.oov = nn.Parameter(empty)
        else:  # kept, so that files of either form load
            self.register_buffer("oov", empty)
        self.replaces = oov == "vector"
        self.candidate = None if candidate is None else self._checked(candidate)

    def _checked(self, candidate: Sequence[int]) -> tuple[int, ...]:
        if len(candidate) != len(self.fields) or not all(0 <= c < self.dim for c in candidate):
            raise ValueError(
                f"candidate must be {len(self.fields)} numbers from 0 to {self.dim - 1}, got {tuple(candidate)}"
            )
        return tuple(candidate)

    def choose(self, candidate: Sequence[int] | None) -> None:
        """Keep the numbers 0 .. c of each field from now on; all (in training: drawn ones) where None.

        Args:
            candidate: c of each field.

        Raises:
            ValueError: if they are not as many as fields, below `dim`.
        """
        self.candidate = None if candidate is None else self._checked(candidate)

    def row_mask(self) -> Tensor:
        """(V,): 1 for rows that are kept, else 0."""
        threshold_V1 = self.threshold[self.of_field()] if self.per_field else self.threshold
        return binary_step(torch.linalg.vector_norm(self.weight, ord=self.p, dim=1) - threshold_V1[:, 0])

    def kept(self) -> Tensor:
        mask_V1 = self.row_mask()[:, None]
        weight_VD = self.weight * mask_V1
        if self.replaces:
            weight_VD = weight_VD + (1 - mask_V1) * self.oov[self.of_field()]
        if self.candidate is None:
            return weight_VD
        last_V = self.weight.new_tensor(self.candidate)[self.of_field()]
        return weight_VD * (torch.arange(self.dim, device=last_V.device) <= last_V[:, None])

    def forward(self, ids: Tensor, weight_VD: Tensor | None = None) -> Tensor:
        e_BFD = super().forward(ids, weight_VD)
        if not self.training or self.candidate is not None:
            return e_BFD
        last_BF1 = torch.randint(self.dim, (*e_BFD.shape[:2], 1), device=e_BFD.device)
        return e_BFD * (torch.arange(self.dim, device=e_BFD.device) <= last_BF1)

    def penalty(self) -> Tensor:
        return self.weight_of_penalty * (-self.threshold).exp().sum()


class PEPTable(Table):
    """PEP: soft thresholds that are learned, so that numbers become 0.

    Args:
        fields, dim: of the table.
        grain: one threshold for all ("global"), for each "field", each "value" or each "number".
        initial: of s; -15 to -7.

    Raises:
        ValueError: if the grain is unknown.
    """

    def __init__(self, fields: Sequence[int], dim: int, *, grain: str = "value", initial: float = -7.0) -> None:
        super().__init__(fields, dim)
        if grain not in GRAINS:
            raise ValueError(f"grain must be one of {', '.join(GRAINS)}, got {grain!r}")
        self.per_field = grain == "field"
        rows, columns = {"global": (1, 1), "field": (len(self.fields), 1), "value": (len(self.weight), 1)}.get(
            grain, (len(self.weight), dim)
        )
        self.s = nn.Parameter(torch.full((rows, columns), initial))

    def kept(self) -> Tensor:
        s = self.s[self.of_field()] if self.per_field else self.s
        return self.weight.sign() * (self.weight.abs() - s.sigmoid()).relu()


class BlockGatedTable(Table):
    """DNIS: the numbers of a field stand in blocks, each with a gate in [0, 1]; small ones are 0.

    Args:
        fields, dim: of the table.
        blocks: which divide `dim`.
        least: gates below it count as 0 in evaluation.

    Raises:
        ValueError: if the blocks do not divide the width.
    """

    def __init__(self, fields: Sequence[int], dim: int, *, blocks: int = 4, least: float = 1e-3) -> None:
        super().__init__(fields, dim)
        if blocks < 1 or dim % blocks:
            raise ValueError(f"blocks must divide dim ({dim}), got {blocks}")
        self.least = least
        self.gate = nn.Parameter(torch.ones(len(self.fields), blocks))

    def kept(self) -> Tensor:
        gate = self.gate.clamp(0, 1)
        if not self.training:
            gate = gate * (gate >= self.least)
        return self.weight * gate.repeat_interleave(self.dim // gate.shape[1], 1)[self.of_field()]


class RoundedTable(Table):
    """Numbers in eight bits: a row's are whole multiples of its largest over 127.

    Args:
        fields, dim: of the table.
    """

    def kept(self) -> Tensor:
        step_V1 = self.weight.detach().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        rounded = (self.weight.detach() / step_V1).round() * step_V1
        return self.weight + (rounded - self.weight).detach()

    def stored(self) -> int:
        """A quarter of a number for each, and a whole one for each row's step."""
        return self.weight.numel() // 4 + len(self.weight)


class MixedTable(ComposedTable):
    """MDE: fields of many values have fewer numbers each, and a linear map to the common width.

    Args:
        fields: how many values each has.
        dim: D, of the smallest field.
        alpha: 0 gives all fields `dim`.
    """

    def __init__(self, fields: Sequence[int], dim: int, *, alpha: float = 0.3) -> None:
        super().__init__(check_fields(fields), dim)
        self.dims = tuple(max(1, round(dim * (min(fields) / size) ** alpha)) for size in fields)
        self.tables = nn.ModuleList(FieldTable([size], d) for size, d in zip(self.fields, self.dims))
        self.maps = nn.ModuleList(nn.Linear(d, dim, bias=False) for d in self.dims)

    def vectors(self, ids_BF: Tensor) -> Tensor:
        parts = zip(self.tables, self.maps, strict=True)
        return torch.cat([to(table(ids_BF[:, i : i + 1])) for i, (table, to) in enumerate(parts)], 1)


class AutoDimTable(ComposedTable):
    """AutoDim: each field's softmax over tables of several widths, all brought to one width and batch-normalised.

    Args:
        fields: how many values each has.
        dim: D.
        widths: of the tables; a quarter, half and all of D where None.
        temperature: tau.

    Raises:
        ValueError: if there is no width, or one is not positive.
    """

    def __init__(
        self, fields: Sequence[int], dim: int, *, widths: Sequence[int] | None = None, temperature: float = 1.0
    ) -> None:
        super().__init__(fields, dim)
        self.widths = tuple((max(1, dim // 4), max(1, dim // 2), dim) if widths is None else widths)
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"widths must be positive, one at least, got {self.widths}")
        self.temperature = temperature
        self.tables = nn.ModuleList(FieldTable(fields, width) for width in self.widths)
        self.maps = nn.ModuleList(nn.Linear(width, dim) for width in self.widths)
        self.norms = nn.ModuleList(nn.BatchNorm1d(dim, affine=False) for _ in self.widths)
        self.logits = nn.Parameter(torch.zeros(len(fields), len(self.widths)))

    def vectors(self, ids_BF: Tensor) -> Tensor:
        parts = [
            norm(to(table(ids_BF)).flatten(0, 1)).unflatten(0, (len(ids_BF), -1))
            for table, to, norm in zip(self.tables, self.maps, self.norms, strict=True)
        ]
        share_FW = (self.logits / self.temperature).softmax(1)
        return (torch.stack(parts, -1) * share_FW[:, None]).sum(-1)

    def chosen(self) -> tuple[int, ...]:
        """The width of each field with the largest share."""
        return tuple(self.widths[w] for w in self.logits.argmax(1).tolist())

    def stored(self) -> int:
        """The numbers of the chosen tables and all maps."""
        chosen = sum(size * width for size, width in zip(self.fields, self.chosen(), strict=True))
        return chosen + sum(p.numel() for p in self.maps.parameters())
