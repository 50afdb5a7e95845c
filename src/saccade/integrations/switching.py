"""What `switch` does alike in transformers and in diffusers: names its layers, and reports.

Shape letters: B batch, H heads, N tokens, E width of values.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from saccade.tables import table

__all__ = ["LayerReport", "Report", "choose"]


@dataclass
class LayerReport:
    """What a mechanism did in one layer, over the inputs seen.

    Attributes:
        layer: its number in the model.
        name: its module path.
        density: share of dense attention's query-key pairs that were computed, where the mechanism ran.
        relative_error: sum |out - dense| / sum |dense| of the layer's output before its output projection, on its own
            inputs (the measure on which SpargeAttn calibrates).
        calls: times that the mechanism ran.
        dense_calls: times that the layer ran dense attention instead (decoding, cross-attention, its own window).
        head_density: of each head alone.
        head_errors: what each head adds to `relative_error`.
    """

    layer: int
    name: str
    density: float = 1.0
    relative_error: float = 0.0
    calls: int = 0
    dense_calls: int = 0
    head_density: tuple[float, ...] = field(default=(), repr=False)
    head_errors: tuple[float, ...] = field(default=(), repr=False)
    _kept: Tensor | float = field(default=0.0, repr=False)
    _pairs: Tensor | float = field(default=0.0, repr=False)
    _off: Tensor | float = field(default=0.0, repr=False)
    _size: float = field(default=0.0, repr=False)

    def add(self, kept_H: Tensor, pairs_H: Tensor, out_BHNE: Tensor, dense_BHNE: Tensor) -> None:
        """Enter one call of the mechanism."""
        self.calls += 1
        self._kept = self._kept + kept_H.cpu()
        self._pairs = self._pairs + pairs_H.cpu()
        off_BHNE = (out_BHNE - dense_BHNE).abs()
        self._off = self._off + off_BHNE.sum((0, 2, 3), dtype=torch.float64).cpu()
        self._size += float(dense_BHNE.abs().sum(dtype=torch.float64))
        self.head_density = tuple((self._kept / self._pairs).nan_to_num(1.0).tolist())
        self.head_errors = tuple((self._off / self._size).tolist() if self._size else [0.0] * len(self._off))
        pairs = float(self._pairs.sum())
        self.density = float(torch.as_tensor(self._kept).sum()) / pairs if pairs else 1.0
        self.relative_error = sum(self.head_errors)


@dataclass
class Report:
    """What `switch` yields.

    Attributes:
        slug, options: what was switched on.
        layers: one entry per layer that was switched; measured with `report=True`, else empty.
    """

    slug: str
    options: dict[str, Any]
    layers: list[LayerReport] = field(default_factory=list)

    @property
    def density(self) -> float:
        """Over all layers."""
        ran = [layer for layer in self.layers if layer.calls]
        pairs = sum(float(torch.as_tensor(layer._pairs).sum()) for layer in ran)
        return sum(float(torch.as_tensor(layer._kept).sum()) for layer in ran) / pairs if pairs else 1.0

    def table(self) -> str:
        """One line per layer."""
        if not self.layers:
            return "nothing was measured: switch(..., report=True) does"
        rows = [
            (row.name, str(row.layer), f"{row.density:.1%}", f"{row.relative_error:.2e}", str(row.calls))
            + (str(row.dense_calls),)
            for row in self.layers
        ]
        return table(("module", "layer", "density", "deviation", "calls", "dense"), rows)

    def __str__(self) -> str:
        return self.table()


def choose(places: Mapping[str, int], wanted: Sequence[int | str], name: str) -> set[str]:
    """The module paths that layer numbers and patterns stand for.

    Args:
        places: module path -> number of every layer that could be switched.
        wanted: numbers (negative from the end) and patterns of module path.
        name: of the argument, for messages.

    Raises:
        ValueError: if `wanted` is no list, or one of it is no layer.

    >>> sorted(choose({"a.0": 0, "a.1": 1, "b.0": 2}, ["a.*", -1], "layers"))
    ['a.0', 'a.1', 'b.0']
    """
    if isinstance(wanted, (str, int)):
        raise ValueError(f"{name} must be a list of layer numbers or patterns, got {wanted!r}")
    count = max(places.values()) + 1
    chosen = set()
    for want in wanted:
        if isinstance(want, str):
            met = set(fnmatch.filter(places, want))
        elif isinstance(want, int):
            met = {place for place, number in places.items() if number == (want + count if want < 0 else want)}
        else:
            met = set()
        if not met:
            example = next(iter(places))
            raise ValueError(f"{name}: no layer is {want!r}; there are layers 0 to {count - 1}, such as {example!r}")
        chosen |= met
    return chosen
