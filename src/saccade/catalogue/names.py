"""The authors' names of parameters as tables: every tensor is placed by its name, or refused.

A table's keys are the authors' names, its values ours; a placeholder stands for one part of a name, between dots or
slashes, and is carried over:

    Names({
        "layers.{i}.wq.{leaf}": "blocks.{i}.q_proj.{leaf}",
        "layers.{i}.position_index": None,      # known, and made anew here: dropped
    })

Nothing goes by the order or the shape of tensors. Where a name of ours needs more than placeholders, a function of
them gives it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: what a table says of a name: ours with placeholders, a function of the placeholders' texts, or None for dropped
Place = str | Callable[[Mapping[str, str]], str] | None

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
#: names in a message
_SHOWN = 5


@dataclass(frozen=True)
class Names:
    """A port's `convert`: the authors' tensors under our names.

    >>> names = Names({"layers.{i}.wq.{leaf}": "blocks.{i}.q_proj.{leaf}", "steps": None})
    >>> names({"layers.0.wq.weight": 1, "steps": 2})
    {'blocks.0.q_proj.weight': 1}
    """

    table: Mapping[str, Place]

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: naming the tensors for which the table has no place, or two that would have the same.
        """
        ours: dict[str, Tensor] = {}
        origins: dict[str, str] = {}
        strange = []
        for theirs, tensor in state.items():
            found = self._find(theirs)
            if found is None:
                strange.append(theirs)
                if len(strange) > _SHOWN:
                    break
                continue
            place, texts = found
            if place is None:
                continue
            name = _fill(place, texts)
            if name in origins:
                raise ValueError(f"{origins[name]} and {theirs} have the same place, {name}")
            origins[name], ours[name] = theirs, tensor
        if strange:
            raise ValueError(f"no place for {listed(strange)}")
        return ours

    def within(self, theirs: str, ours: str) -> dict[str, Place]:
        """This table one module further in, for a larger table.

        >>> Names({"wq.{leaf}": "q_proj.{leaf}"}).within("layers.{i}.", "blocks.{i}.")
        {'layers.{i}.wq.{leaf}': 'blocks.{i}.q_proj.{leaf}'}
        """
        return {theirs + name: _under(ours, place) for name, place in self.table.items()}

    def _find(self, name: str) -> tuple[Place, Mapping[str, str]] | None:
        for pattern, place in self._patterns.get(_parts(name), ()):
            found = pattern.fullmatch(name)
            if found is not None:
                return place, found.groupdict()
        return None

    @cached_property
    def _patterns(self) -> dict[int, list[tuple[re.Pattern[str], Place]]]:
        """By number of parts, so that a name meets few of them."""
        patterns: dict[int, list[tuple[re.Pattern[str], Place]]] = {}
        for theirs, place in self.table.items():
            texts = _PLACEHOLDER.split(theirs)
            pattern = "".join(f"(?P<{text}>[^./]+)" if i % 2 else re.escape(text) for i, text in enumerate(texts))
            patterns.setdefault(_parts(theirs), []).append((re.compile(pattern), place))
        return patterns


def listed(names: list[str]) -> str:
    """Some names for a message."""
    shown = ", ".join(name if len(name) <= 200 else f"{name[:200]}..." for name in names[:_SHOWN])
    return shown + (" and more" if len(names) > _SHOWN else "")


def _parts(name: str) -> int:
    return name.count(".") + name.count("/")


def _fill(place: str | Callable[[Mapping[str, str]], str], texts: Mapping[str, str]) -> str:
    return place.format_map(texts) if isinstance(place, str) else place(texts)


def _under(prefix: str, place: Place) -> Place:
    if place is None or isinstance(place, str):
        return None if place is None else prefix + place
    return lambda texts: prefix.format_map(texts) + place(texts)
