"""What was inserted: the places, and what the gates cost."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from saccade.tables import table


@dataclass(frozen=True)
class Place:
    """One gate in the network.

    Attributes:
        path: the module after which it stands.
        gate: where its parameters are in `state_dict()`.
        channels: C of the map.
        size: H and W of the map in the dry run; None where there was none.
        parameters: of the gate.
        flops: multiply-adds of its convolutions and matrix products on that map.
        change: |gated - map| / |map| on that map, as inserted; 0 keeps the network's behaviour exactly.
    """

    path: str
    gate: str
    channels: int
    size: tuple[int, int] | None
    parameters: int
    flops: int | None
    change: float | None


@dataclass
class Inserted:
    """What `insert` did; `print` it for a table, `remove()` undoes it.

    Attributes:
        slug, arguments: the gate.
        gentle: it stands behind a learnable amount that starts at zero, where it does not start as the identity.
        places: one entry per gate.
        parameters, flops: of the network without them (multiply-adds of the dry run; None without one).
        input: shapes of the dry run's inputs.
    """

    slug: str
    arguments: dict[str, Any]
    gentle: bool
    places: list[Place]
    parameters: int
    flops: int | None
    input: list[tuple[int, ...]]
    _undo: list[tuple[nn.Module, str, RemovableHandle]] = field(default_factory=list, repr=False)

    @property
    def added_parameters(self) -> int:
        return sum(place.parameters for place in self.places)

    @property
    def added_flops(self) -> int | None:
        """Multiply-adds; None without a dry run."""
        known = [place.flops for place in self.places if place.flops is not None]
        return sum(known) if len(known) == len(self.places) else None

    def remove(self) -> None:
        """Take the gates out again; the network is as it was. A second call does nothing."""
        for module, name, handle in self._undo:
            handle.remove()
            delattr(module, name)
        self._undo.clear()

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values."""
        rows = [dataclasses.asdict(place) for place in self.places]
        names = ("slug", "arguments", "gentle", "input", "parameters", "flops", "added_parameters", "added_flops")
        return {**{name: getattr(self, name) for name in names}, "places": rows}

    def table(self, gently: str = "gentle=True") -> str:
        """One line per gate, then the sums. `gently`: how the reader asks for a gentle start."""
        rows = []
        for place in self.places:
            size = "x".join(map(str, (place.channels, *(place.size or ("?", "?")))))
            work = "?" if place.flops is None else f"{place.flops:,}"
            change = "?" if place.change is None else f"{place.change:.1%}" if place.change else "none"
            rows.append((place.path, size, f"{place.parameters:,}", work, change))
        lines = [table(("after", "map", "parameters", "multiply-adds", "change at start"), rows)]
        added, flops = self.added_parameters, self.added_flops
        lines.append(
            f"{self.slug} x {len(self.places)}: {added:,} parameters "
            f"({added / max(1, self.parameters):+.2%} of {self.parameters:,})"
        )
        if flops is not None and self.flops is not None:
            lines[-1] += f", {flops:,} multiply-adds ({flops / max(1, self.flops):+.2%} of {self.flops:,}"
            lines[-1] += f" on an input of {' and '.join('x'.join(map(str, shape)) for shape in self.input)})"
        if any(place.change for place in self.places):
            lines.append(f"This gate changes the map from the start; {gently} begins with what the network does now.")
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.table()
