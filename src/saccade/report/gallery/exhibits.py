"""What the gallery holds: how it is made, its pictures, a gate after training, the table of all.

Shape letters: P photographs, C channels, H and W height and width, S side of a square picture.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from saccade.tables import fold, table
from saccade.train.labels import labels

#: names of `saccade.train.data.photographs`
PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket")

#: what the pictures of a gate are called, and what their numbers are
MULTIPLIED, ONE_CHANNEL = "what the map is multiplied with", "one channel of it"
ATTENDED, FROM_MIDDLE = "attended to", "seen from the middle"
NUMBERS = {
    MULTIPLIED: "the mean over channels",
    ONE_CHANNEL: "the one that varies most over positions",
    ATTENDED: "|weight| relative to an even share, brightness its square root",
    FROM_MIDDLE: "the weights of the ringed position, likewise",
}


@dataclass(frozen=True)
class Settings:
    """How the gallery is made.

    Attributes:
        steps: of training, for each gate.
        side: S of the photographs, in grey, cut to squares.
        crop: side of the crops to learn from.
        batch: crops a step.
        held_out: crops on which accuracy is measured, drawn like those to learn from.
        photographs: how many of them, from the first on.
        covered: how many of them are shown a second time with a covered square.
        seed: of everything random.

    Raises:
        ValueError: if one is out of range.
    """

    steps: int = 400
    side: int = 192
    crop: int = 64
    batch: int = 32
    held_out: int = 512
    photographs: int = len(PHOTOGRAPHS)
    covered: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "held_out"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 8 <= self.crop <= self.side:
            raise ValueError(f"crop must be between 8 and the photographs' side ({self.side}), got {self.crop}")
        if not 2 <= self.photographs <= len(PHOTOGRAPHS):
            raise ValueError(f"photographs must be between 2 and {len(PHOTOGRAPHS)}, got {self.photographs}")
        if not 0 <= self.covered <= self.photographs:
            raise ValueError(f"covered must be between 0 and {self.photographs}, got {self.covered}")


@dataclass(frozen=True)
class Picture:
    """A photograph as the network sees it.

    Attributes:
        name: of the photograph.
        image_SS: grey, in [0, 1].
        covered: (top, left, side) of the covered square, or None.
    """

    name: str
    image_SS: Tensor
    covered: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class Exhibit:
    """A gate after training; also the network without one.

    Attributes:
        name: as asked for.
        slug: None without a gate.
        parameters: that it adds.
        accuracy: on fresh crops.
        named: whole photographs, covered ones among them, whose name the network says rightly.
        covered_share: its map on the covered square over its map elsewhere, on fresh crops; None without a map.
        seconds: of training.
        maps: (P, H, W) by what they are.
        channels_PC: the mean over positions, where the gate tells channels apart.
    """

    name: str
    slug: str | None
    parameters: int
    accuracy: float
    named: int
    covered_share: float | None
    seconds: float
    maps: dict[str, Tensor]
    channels_PC: Tensor | None


@dataclass(frozen=True)
class Gallery:
    """Exhibits, with all that was common to them.

    Attributes:
        settings: of the training.
        pictures: that all gates are shown on.
        exhibits: the gates, after the network without one.
        parameters: of the network without a gate.
        machine: what it was made on.
        day: ISO date.
    """

    settings: Settings
    pictures: list[Picture]
    exhibits: list[Exhibit]
    parameters: int
    machine: dict[str, Any]
    day: str

    @property
    def headings(self) -> tuple[str, ...]:
        """Of the table."""
        named = f"whole photographs named, of {len(self.pictures)}"
        return ("gate", "parameters added", "accuracy", named, "map on covered / elsewhere", "seconds of training")

    def cells(self, exhibit: Exhibit) -> tuple[str, ...]:
        """A row of the table."""
        share = "" if exhibit.covered_share is None else f"{exhibit.covered_share:.2f}"
        figures = (f"{exhibit.parameters:,}", f"{exhibit.accuracy:.1%}", str(exhibit.named), share)
        return (exhibit.name, *figures, f"{exhibit.seconds:.1f}")

    def table(self) -> str:
        """A line per exhibit."""
        short = labels(exhibit.name for exhibit in self.exhibits)
        rows = [(short.of[exhibit.name], *self.cells(exhibit)[1:]) for exhibit in self.exhibits]
        return "\n".join([table(self.headings, rows), *(line for text in short.caption for line in fold(text))])

    def as_dict(self) -> dict[str, Any]:
        """Figures without pictures, in plain values."""
        drop = ("maps", "channels_PC")
        rows = [{k: v for k, v in vars(exhibit).items() if k not in drop} for exhibit in self.exhibits]
        common = {"settings": asdict(self.settings), "machine": self.machine, "date": self.day}
        return {**common, "parameters": self.parameters, "gates": rows}
