"""The authors' names of parameters as tables: every tensor is placed by its name, or refused.

A table's keys are the authors' names, its values ours; a placeholder stands for one part of a name, between dots or
slashes, and is carried over; one with a star for one part or more:

    Names({
        "layers.{i}.wq.{leaf}": "blocks.{i}.q_proj.{leaf}",
        "layers.{i}.mlp.{rest*}": "blocks.{i}.mlp.{rest}",
        "layers.{i}.qkv.{leaf}": split("blocks.{i}.{part}_proj.{leaf}", "q", "k", "v"),     # the rows, in equal parts
        "layers.{i}.heads.{h}.{leaf}": joined("blocks.{i}.heads.{leaf}", "h", torch.stack),  # parts 0, 1 ... in order
        "head.weight": laid("head.weight", lambda weight: weight.T),                        # the numbers, laid out anew
        "layers.{i}.position_index": None,                                 # known, and made anew here: dropped
    })

Names with few placeholders come first, then those with many, then those with a star, the longest first; so that
`"{name*}": "{name}"` leaves all others as they are. Nothing goes by the order or the shape of tensors. Where a name of
ours needs more than placeholders, a function of them gives it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Name = str | Callable[[Mapping[str, str]], str]


@dataclass(frozen=True)
class Laid:
    """A place where the authors' numbers stand in another layout; see `laid`.

    Attributes:
        name, layout: as in `laid`.
    """

    name: Name
    layout: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """The places of the equal parts of one tensor; see `split`.

    Attributes:
        names: ours, in the order of the parts.
    """

    names: tuple[Name, ...]


@dataclass(frozen=True)
class Joined:
    """The place of what is several tensors there; see `joined`.

    Attributes:
        name, over, join: as in `joined`.
    """

    name: Name
    over: str
    join: Callable[[list[Tensor]], Tensor]


#: what a table says of a name: ours with placeholders, a function of the placeholders' texts, several of them for the
#: parts of a tensor, one for several tensors, one with its layout, or None for dropped
Place = Name | Laid | Split | Joined | None

_PLACEHOLDER = re.compile(r"\{(\w+\*?)\}")
#: names in a message
_SHOWN = 5


def laid(name: Name, layout: Callable[[Tensor], Tensor]) -> Laid:
    """A tensor that is laid out otherwise here: `layout` of theirs is ours.

    Args:
        name: ours.
        layout: their tensor -> ours.
    """
    return Laid(name, layout)


def split(name: str, *parts: str) -> Split:
    """One tensor of theirs that is several here, in equal parts of its first axis; `{part}` is each part's name.

    Args:
        name: ours, with `{part}` and the placeholders of theirs.
        parts: in the order of their rows.

    >>> split("{part}_proj.{leaf}", "q", "k", "v").names
    ('q_proj.{leaf}', 'k_proj.{leaf}', 'v_proj.{leaf}')
    """
    return Split(tuple(name.replace("{part}", part) for part in parts))


def joined(name: str, over: str, join: Callable[[list[Tensor]], Tensor]) -> Joined:
    """Several tensors of theirs that are one here: `join` of them in the order of the placeholder `over`, 0, 1 ...

    Args:
        name: ours, without the placeholder `over`.
        over: the placeholder that numbers them.
        join: of their tensors, `torch.stack` or `torch.cat`.
    """
    return Joined(name, over, join)


@dataclass(frozen=True)
class Names:
    """A port's `convert`: the authors' tensors under our names.

    Attributes:
        table: the authors' names -> ours.

    >>> names = Names({"layers.{i}.wq.{leaf}": "blocks.{i}.q_proj.{leaf}", "steps": None})
    >>> names({"layers.0.wq.weight": 1, "steps": 2})
    {'blocks.0.q_proj.weight': 1}
    """

    table: Mapping[str, Place]

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """
        Raises:
            ValueError: naming the tensors for which the table has no place, or two that would have the same, or one
                that cannot be split or laid out as the table says.
        """
        ours: dict[str, Tensor] = {}
        origins: dict[str, str] = {}
        strange = []
        pieces: dict[str, tuple[Joined, dict[str, Tensor]]] = {}
        for theirs, tensor in state.items():
            found = self._find(theirs)
            if found is None:
                strange.append(theirs)
                if len(strange) > _SHOWN:
                    break
                continue
            place, texts = found
            if isinstance(place, Joined):
                number, name = texts[place.over], _fill(place.name, texts)
                of_name = pieces.setdefault(name, (place, {}))[1]
                if number in of_name or name in origins:
                    raise ValueError(f"{theirs} and another have the same place, {name}")
                of_name[number] = tensor
                continue
            for name, part in _placed(theirs, tensor, place, texts):
                if name in origins:
                    raise ValueError(f"{origins[name]} and {theirs} have the same place, {name}")
                origins[name], ours[name] = theirs, part
        if strange:
            raise ValueError(f"no place for {listed(strange)}")
        return ours | {name: _joined(name, place, parts) for name, (place, parts) in pieces.items()}

    def within(self, theirs: str, ours: str) -> dict[str, Place]:
        """This table one module further in, for a larger table.

        >>> Names({"wq.{leaf}": "q_proj.{leaf}"}).within("layers.{i}.", "blocks.{i}.")
        {'layers.{i}.wq.{leaf}': 'blocks.{i}.q_proj.{leaf}'}
        """
        return {theirs + name: _under(ours, place) for name, place in self.table.items()}

    def _find(self, name: str) -> tuple[Place, Mapping[str, str]] | None:
        exact, starred = self._patterns
        for pattern, place in (*exact.get(_parts(name), ()), *starred):
            found = pattern.fullmatch(name)
            if found is not None:
                return place, found.groupdict()
        return None

    @cached_property
    def _patterns(self) -> tuple[dict[int, list[tuple[re.Pattern[str], Place]]], list[tuple[re.Pattern[str], Place]]]:
        """By number of parts, so that a name meets few of them; and those with a star."""
        exact: dict[int, list[tuple[re.Pattern[str], Place]]] = {}
        starred: list[tuple[re.Pattern[str], Place]] = []
        for theirs in sorted(self.table, key=_generality):
            texts = _PLACEHOLDER.split(theirs)
            pattern = "".join(_group(text) if i % 2 else re.escape(text) for i, text in enumerate(texts))
            chosen = starred if "*}" in theirs else exact.setdefault(_parts(theirs), [])
            chosen.append((re.compile(pattern), self.table[theirs]))
        return exact, starred


def listed(names: list[str]) -> str:
    """Some names for a message."""
    shown = ", ".join(name if len(name) <= 200 else f"{name[:200]}..." for name in names[:_SHOWN])
    return shown + (" and more" if len(names) > _SHOWN else "")


def _placed(theirs: str, tensor: Tensor, place: Place, texts: Mapping[str, str]) -> list[tuple[str, Tensor]]:
    """Our names of a tensor or its parts, with these."""
    names = [_fill(name, texts) for name in _names(place)]
    if isinstance(place, Laid):
        try:
            return [(names[0], place.layout(tensor))]
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"{theirs} of shape {tuple(tensor.shape)} is not laid out as {names[0]} needs") from error
    if isinstance(place, Split):
        if not tensor.ndim or tensor.shape[0] % len(names):
            raise ValueError(f"{theirs} must be {len(names)} equal parts, got shape {tuple(tensor.shape)}")
        return list(zip(names, tensor.chunk(len(names))))
    return [(name, tensor) for name in names]


def _joined(name: str, place: Joined, parts: Mapping[str, Tensor]) -> Tensor:
    missing = [str(i) for i in range(len(parts)) if str(i) not in parts]
    if missing:
        raise ValueError(f"{name} is joined of parts 0 to {len(parts) - 1}, got {listed(list(parts))}")
    try:
        return place.join([parts[str(i)] for i in range(len(parts))])
    except RuntimeError as error:
        raise ValueError(f"the parts of {name} have different shapes") from error


def _names(place: Place) -> tuple[Name, ...]:
    if isinstance(place, Split):
        return place.names
    name = place.name if isinstance(place, (Laid, Joined)) else place
    return () if name is None else (name,)


def _generality(theirs: str) -> tuple[int, int]:
    """Few placeholders and long texts come first; among names with a star, long texts alone."""
    texts = _PLACEHOLDER.split(theirs)
    return 0 if "*}" in theirs else len(texts), -sum(map(len, texts[::2]))


def _group(placeholder: str) -> str:
    return f"(?P<{placeholder[:-1]}>.+)" if placeholder.endswith("*") else f"(?P<{placeholder}>[^./]+)"


def _parts(name: str) -> int:
    return name.count(".") + name.count("/")


def _fill(name: Name, texts: Mapping[str, str]) -> str:
    return name.format_map(texts) if isinstance(name, str) else name(texts)


def _under(prefix: str, place: Place) -> Place:
    if isinstance(place, Split):
        return Split(tuple(_named_under(prefix, name) for name in place.names))
    if isinstance(place, (Laid, Joined)):
        return replace(place, name=_named_under(prefix, place.name))
    return None if place is None else _named_under(prefix, place)


def _named_under(prefix: str, name: Name) -> Name:
    return prefix + name if isinstance(name, str) else lambda texts: prefix.format_map(texts) + name(texts)
