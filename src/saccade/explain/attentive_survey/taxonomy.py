"""The four axes: every part of the catalogue, and the survey's well-known works, in one place each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saccade import catalogue
from saccade.catalogue import AXES
from saccade.extras import new_figure
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: what the values mean
MEANINGS: dict[str, dict[str, str]] = {
    "sequences": {
        "self": "queries and keys from the same tokens",
        "distinctive": "queries from one sequence, keys from another",
        "co-attention": "several inputs that guide each other",
    },
    "levels": {
        "single": "weights of the original input only",
        "multi": "attention on what attention made",
    },
    "positions": {
        "soft": "all positions have weights, differentiable",
        "hard": "some positions are chosen, the rest is not read",
        "local": "a window of positions",
    },
    "representations": {
        "single": "one representation of the input",
        "multi-representational": "several views of the input are weighed",
        "multi-dimensional": "each channel has weights of its own",
    },
}


@dataclass(frozen=True)
class Descriptor:
    """A mechanism on the four axes; a work that is of several kinds has several values.

    Attributes:
        name: the slug, or who wrote it.
        title: of the paper.
        sequences, levels, positions, representations: values of `saccade.catalogue.AXES`.
        heads: whether it has several heads, where that is known; no axis, an attribute.
    """

    name: str
    title: str
    sequences: tuple[str, ...]
    levels: tuple[str, ...]
    positions: tuple[str, ...]
    representations: tuple[str, ...]
    heads: bool | None = None

    def values(self, axis: str) -> tuple[str, ...]:
        """On one axis.

        Args:
            axis: of `saccade.catalogue.AXES`.
        """
        return getattr(self, axis)


def _work(
    name: str,
    title: str,
    sequences: str,
    levels: str,
    positions: str,
    representations: str = "single",
    heads: bool = False,
) -> Descriptor:
    axes = [tuple(text.split(" and ")) for text in (sequences, levels, positions, representations)]
    return Descriptor(name, title, axes[0], axes[1], axes[2], axes[3], heads)


#: the survey's placements
WORKS = (
    _work("Bahdanau 2015", "translation", "distinctive", "single", "soft"),
    _work("Xu 2015", "captioning", "distinctive", "single", "soft and hard"),
    _work("Luong 2015", "translation", "distinctive", "single", "soft and local"),
    _work("Lu 2016", "visual questions", "co-attention", "multi", "soft"),
    _work("Yang 2016", "documents", "self", "multi", "soft"),
    _work("Vaswani 2017", "translation", "self and distinctive", "multi", "soft", heads=True),
    _work("Kiela 2018", "sentence embeddings", "self", "single", "soft", "multi-representational"),
    _work("Shen 2018", "sentences", "self", "single", "soft", "multi-dimensional"),
    _work("Velickovic 2018", "graphs", "self", "multi", "soft", heads=True),
)


def describe(slug: str) -> Descriptor:
    """A part of the catalogue on the four axes.

    Args:
        slug: of the part.

    Raises:
        ValueError: if there is no such part.
    """
    catalogue.paper(slug)
    found = {part.slug: part for part in catalogue.parts()}
    if slug not in found:
        raise ValueError(f"{slug!r} is planned and not built yet: it has no place on the axes")
    return _described(found[slug])


@dataclass
class Taxonomy:
    """Mechanisms on the four axes.

    Attributes:
        entries: in the order of the catalogue.
    """

    entries: list[Descriptor]

    def where(self, **axes: str) -> Taxonomy:
        """Those that have these values, one or more of them.

        Args:
            **axes: values by axis.

        Raises:
            ValueError: if there is no such axis or value.
        """
        for axis, value in axes.items():
            if value not in AXES.get(axis, ()):
                raise ValueError(f"{axis}={value!r} is not on the axes {AXES}")
        return Taxonomy([e for e in self.entries if all(value in e.values(axis) for axis, value in axes.items())])

    def counts(self) -> dict[str, dict[str, int]]:
        """How many there are of each value, by axis."""
        found = {axis: Counter(value for entry in self.entries for value in entry.values(axis)) for axis in AXES}
        return {axis: {value: found[axis][value] for value in values} for axis, values in AXES.items()}

    def table(self) -> str:
        """A line a mechanism."""
        rows = [(entry.name, *(" and ".join(entry.values(axis)) for axis in AXES)) for entry in self.entries]
        return table(("mechanism", *AXES), rows)

    def plot(self) -> Figure:
        """Bars of the counts, a panel an axis.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(11, 2.6)
        for axis, (name, counts) in zip(figure.subplots(1, len(AXES)), self.counts().items(), strict=True):
            axis.barh(list(counts), list(counts.values()))
            axis.set_title(name, fontsize=9)
        return figure


def taxonomy(kind: str | None = None) -> Taxonomy:
    """All parts of the catalogue on the four axes.

    Args:
        kind: of those alone; of `saccade.catalogue.KINDS`.

    Raises:
        ValueError: if there is no such kind.
    """
    return Taxonomy([_described(part) for part in catalogue.select(kind=kind)])


def _described(part: catalogue.Summary) -> Descriptor:
    sequences, levels, positions, representations = ((part.taxonomy[axis],) for axis in AXES)
    return Descriptor(part.slug, part.title, sequences, levels, positions, representations)
