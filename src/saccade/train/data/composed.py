"""Pictures of one thing each, sentences that describe them, and sentences that ask for another picture.

A thing has a size, a colour, a shape and a place (`ATTRIBUTES`). Its description is "a small red circle at the top
left"; a request changes one attribute or two: "make it blue", "make it a square and move it to the bottom left". Words
are numbers of `WORDS`; a text starts with "[start]" and is filled with "[pad]".

Shape letters: B pictures, L words, S side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SIZES = ("small", "large")
COLOURS = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.2),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.9, 0.1),
    "purple": (0.7, 0.15, 0.85),
}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
#: how many values each attribute has: size, colour, shape, place
ATTRIBUTES = (len(SIZES), len(COLOURS), len(SHAPES), len(PLACES))
WORDS = (
    "[pad]", "[start]", "a", "and", "at", "it", "make", "move", "the", "to", "top", "bottom", "left", "right",
    *SIZES, *COLOURS, *SHAPES,
)  # fmt: skip
#: words of the longest text
LONGEST = 12
#: half the side of a small and a large thing, where a thing stands, and how far from there, as shares of the side
_HALF, _MIDDLES, _OFF = (0.12, 0.2), (0.28, 0.72), 0.06
#: brightness of the ground, deviation of the noise on it, and of a thing's colour
_GROUND, _NOISE, _SHADE = (0.2, 0.6), 0.05, 0.06


class Composed(NamedTuple):
    """
    Attributes:
        reference: (B, 3, S, S) in [0, 1].
        request: (B, L), words that say what is to change.
        description: (B, L), words of the reference.
        target: (B, 3, S, S) in [0, 1], what is asked for, on another ground.
        caption: (B, L), words of the target.
        before, after: (B, 4), the attributes of reference and target.
    """

    reference: Tensor
    request: Tensor
    description: Tensor
    target: Tensor
    caption: Tensor
    before: Tensor
    after: Tensor


def composed(count: int, side: int, generator: torch.Generator) -> Composed:
    """Triples of a picture, a request and the picture that it asks for.

    Args:
        count: B.
        side: S, of the pictures, 8 pixels at least.
        generator: of everything random.

    Raises:
        ValueError: if the pictures are too small.
    """
    before_B4 = _drawn(count, generator)
    other_B4 = (before_B4 + 1 + _drawn(count, generator, less=1)) % torch.tensor(ATTRIBUTES)  # differs in each
    order_B4 = torch.rand(count, 4, generator=generator).argsort(1)
    second_B = torch.rand(count, generator=generator) < 0.5
    changed_B4 = (order_B4 == 0) | ((order_B4 == 1) & second_B[:, None])
    after_B4 = torch.where(changed_B4, other_B4, before_B4)
    requests = [_request(values, changed) for values, changed in zip(after_B4.tolist(), changed_B4.tolist())]
    return Composed(
        pictures(before_B4, side, generator),
        encoded(requests),
        encoded([description(values) for values in before_B4.tolist()]),
        pictures(after_B4, side, generator),
        encoded([description(values) for values in after_B4.tolist()]),
        before_B4,
        after_B4,
    )


def pictures(attributes_B4: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Pictures (B, 3, S, S) in [0, 1] of things of these attributes.

    Args:
        attributes_B4: numbers of the values.
        side: S.
        generator: of ground, noise, shade and exact place.

    Raises:
        ValueError: if the pictures are too small.
    """
    if side < 8:
        raise ValueError(f"pictures must have a side of 8 pixels at least, got {side}")
    size_B, colour_B, shape_B, place_B = attributes_B4.unbind(1)
    count = len(attributes_B4)
    half_B, middles = torch.tensor(_HALF)[size_B], torch.tensor(_MIDDLES)
    off_B2 = _OFF * (2 * torch.rand(count, 2, generator=generator) - 1)
    middle_B2 = torch.stack([middles[place_B % 2], middles[place_B // 2]], 1) + off_B2
    at_S = (torch.arange(side) + 0.5) / side
    x_BS, y_BS = ((at_S - middle_B2[:, axis, None]) / half_B[:, None] for axis in (0, 1))
    x_BSS, y_BSS = x_BS[:, None, :].expand(-1, side, -1), y_BS[:, :, None].expand(-1, -1, side)
    square_BSS = torch.maximum(x_BSS.abs(), y_BSS.abs()) <= 1
    inside_4BSS = torch.stack(
        [
            x_BSS.square() + y_BSS.square() <= 1,
            square_BSS,
            (x_BSS.abs() <= (y_BSS + 1) / 2) & (y_BSS <= 1),
            (torch.minimum(x_BSS.abs(), y_BSS.abs()) <= 0.35) & square_BSS,
        ]
    )
    inside_BSS = inside_4BSS[shape_B, torch.arange(count)]
    low, high = _GROUND
    ground_B3 = low + (high - low) * torch.rand(count, 3, generator=generator)
    colour_B3 = torch.tensor(list(COLOURS.values()))[colour_B] + _SHADE * torch.randn(count, 3, generator=generator)
    clear = torch.where(inside_BSS[:, None], colour_B3[..., None, None], ground_B3[..., None, None])
    return (clear + _NOISE * torch.randn(clear.shape, generator=generator)).clamp(0, 1)


def description(attributes: list[int]) -> str:
    """The sentence for a thing.

    >>> description([0, 0, 0, 1])
    'a small red circle at the top right'
    """
    size, colour, shape, place = attributes
    return f"a {SIZES[size]} {list(COLOURS)[colour]} {SHAPES[shape]} at the {PLACES[place]}"


def encoded(sentences: list[str]) -> Tensor:
    """Words of `WORDS` (B, L), the start before them and filled at the end.

    >>> encoded(["make it red"])[0, :5].tolist() == [WORDS.index(w) for w in ("[start]", "make", "it", "red", "[pad]")]
    True
    """
    rows = [[WORDS.index(word) for word in ("[start]", *sentence.split())] for sentence in sentences]
    return torch.tensor([row + [0] * (LONGEST - len(row)) for row in rows])


def _drawn(count: int, generator: torch.Generator, less: int = 0) -> Tensor:
    """Values (B, 4) below each attribute's number less `less`."""
    return torch.stack([torch.randint(n - less, (count,), generator=generator) for n in ATTRIBUTES], 1)


def _request(attributes: list[int], changed: list[bool]) -> str:
    size, colour, shape, place = attributes
    said = (
        f"make it {SIZES[size]}", f"make it {list(COLOURS)[colour]}", f"make it a {SHAPES[shape]}",
        f"move it to the {PLACES[place]}",
    )  # fmt: skip
    return " and ".join(sentence for sentence, is_new in zip(said, changed) if is_new)
