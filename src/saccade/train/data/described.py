"""Scenes of coloured shapes and digits, and a sentence of each: "two red squares left of a blue 7".

    sentence  ->  things | things "left of" things | things "above" things
    things    ->  "a" colour thing | "two" colour things

There is one right sentence of each scene. Half of the things are shapes.

Shape letters: B scenes, S side, T words, K kinds, G things of a scene, c side of a cell.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.train.data.looking import COLOURS as _COLOURS
from saccade.train.data.looking import shapes
from saccade.train.data.pictures import crops, digits

#: cells of a side, each with a thing at most
CELLS = 2
COLOUR_NAMES = ("red", "green", "blue", "yellow")
#: the kinds of things by number
THINGS = ("circle", "square", "ring", "cross", *"0123456789")
_SHAPES = 4
_FIRST = ("<pad>", "<begin>", "<end>", "a", "two", "left", "of", "above")
#: the words by number
WORDS = (*_FIRST, *COLOUR_NAMES, *THINGS, *(f"{name}{'e' * (name == 'cross')}s" for name in THINGS))
PAD, BEGIN, END = 0, 1, 2
_A, _LEFT, _OF, _ABOVE = 3, 5, 6, 7
_COLOUR = len(_FIRST)
_ONE = _COLOUR + len(COLOUR_NAMES)
_MANY = _ONE + len(THINGS)
#: of the longest sentence, with its end
MOST_WORDS = 9


class Described(NamedTuple):
    """
    Attributes:
        images: (B, 3, S, S) in [0, 1].
        captions: (B, T), of each scene the words of its sentence by number, then the end, then what fills up.
        cells: (B, T), for words that name a colour or a thing the cell where that is, row by row; -1 for others.
    """

    images: Tensor
    captions: Tensor
    cells: Tensor


def described(
    count: int,
    side: int,
    generator: torch.Generator,
    *,
    judge: bool = False,
    photographs: Sequence[Tensor] = (),
    most_things: int = 2,
) -> Described:
    """Scenes with one or two things, each once or twice in its cell of 2 x 2.

    Args:
        count: B.
        side: S, even.
        generator: of everything random.
        judge: digits are those that are not learned from.
        photographs: behind the things, dimmed; grey of one brightness where there are none.
        most_things: of a scene, 1 or 2.

    Raises:
        ValueError: if a scene is too small, or the number of things is another.
        ImportError: if scikit-learn is not installed.
    """
    if side < 16 or side % 2 or most_things not in (1, 2):
        raise ValueError(f"side must be even and 16 at least and most_things 1 or 2, got {side} and {most_things}")

    def drawn(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=generator)

    relation_B = drawn(3, count) if most_things == 2 else torch.zeros(count, dtype=torch.long)
    kind_BG = torch.where(drawn(2, count, 2) == 0, drawn(_SHAPES, count, 2), _SHAPES + drawn(10, count, 2))
    colour_BG, pair_BG = drawn(len(COLOUR_NAMES), count, 2), drawn(2, count, 2)
    cell_BG = _cells(relation_B, drawn(CELLS, count, 2))
    if photographs:
        (windows,) = crops([(each,) for each in photographs], count, side, generator, turned=True)
        images = 0.1 + 0.3 * windows
    else:
        images = (0.1 + 0.2 * torch.rand(count, 1, 1, 1, generator=generator)).expand(-1, 3, side, side).clone()
    for number in range(most_things):
        cover_Bcc = _covers(kind_BG[:, number], pair_BG[:, number], side // CELLS, judge, generator)
        there_B = (relation_B > 0) | (number == 0)
        canvas = torch.zeros(count, CELLS * CELLS, *cover_Bcc.shape[1:])
        canvas[torch.arange(count), cell_BG[:, number]] = cover_Bcc * there_B[:, None, None]
        cover_BSS = canvas.unflatten(1, (CELLS, CELLS)).permute(0, 1, 3, 2, 4).reshape(count, 1, side, side)
        images = images + cover_BSS * (_COLOURS[colour_BG[:, number]][..., None, None] - images)
    return Described(images, *_captions(relation_B, kind_BG, colour_BG, pair_BG, cell_BG))


def sentence(words: Iterable[int]) -> str:
    """The words until the end, with spaces between them.

    Args:
        words: by number.

    >>> sentence([3, 8, 12, 2, 0])
    'a red circle'
    """
    found = []
    for word in words:
        if word == END:
            break
        found.append(WORDS[word])
    return " ".join(found)


def _cells(relation_B: Tensor, place_B2: Tensor) -> Tensor:
    """Of the first and second thing: in a row for "left of" (1), in a column for "above" (2)."""
    row_B, column_B = place_B2.unbind(1)
    alone_B2 = (CELLS * row_B + column_B)[:, None].expand(-1, 2)
    beside_B2 = torch.stack([CELLS * row_B, CELLS * row_B + 1], 1)
    above_B2 = torch.stack([column_B, CELLS + column_B], 1)
    return torch.where(relation_B[:, None] == 0, alone_B2, torch.where(relation_B[:, None] == 1, beside_B2, above_B2))


@cache
def _of_digit(judge: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures of digits in the order of what they show, and of each digit the first and how many there are."""
    source = digits()
    images, labels = source[2:] if judge else source[:2]
    counts = labels.bincount(minlength=10)
    return images[labels.argsort(stable=True)], counts.cumsum(0) - counts, counts


def _covers(kind_B: Tensor, pair_B: Tensor, cell: int, judge: bool, generator: torch.Generator) -> Tensor:
    """How much of each pixel of its cell a thing covers, (B, c, c); moved a little, and of two sizes if alone."""
    images, first, counts = _of_digit(judge)
    digit_B = (kind_B - _SHAPES).clamp(min=0)
    which_B = first[digit_B] + (torch.rand(len(kind_B), generator=generator) * counts[digit_B]).long()
    plain_Bcc = shapes(cell)[kind_B.clamp(max=_SHAPES - 1)]
    written_Bcc = F.interpolate(images[which_B], (cell, cell), mode="bilinear")[:, 0].clamp(0, 1)
    cover_Bcc = torch.where((kind_B < _SHAPES)[:, None, None], plain_Bcc, written_Bcc)
    # where in the cell each pixel comes from: once, or twice side by side at half the size
    line_c = (torch.arange(cell) + 0.5) / cell * 2 - 1
    y_Bcc, x_Bcc = (at.expand(len(kind_B), -1, -1) for at in torch.meshgrid(line_c, line_c, indexing="ij"))
    moved_B2 = 0.3 * torch.rand(len(kind_B), 2, generator=generator) - 0.15
    larger_B = (1 + 0.25 * torch.rand(len(kind_B), generator=generator))[:, None, None]
    twice = (pair_B == 1)[:, None, None]
    x_Bcc = torch.where(twice, 2 * (x_Bcc - x_Bcc.sign() / 2), larger_B * x_Bcc + moved_B2[:, :1, None])
    y_Bcc = torch.where(twice, 2 * y_Bcc, larger_B * y_Bcc) + moved_B2[:, 1:, None]
    at_Bcc2 = torch.stack([x_Bcc, y_Bcc], 3)
    return F.grid_sample(cover_Bcc[:, None], at_Bcc2, align_corners=False)[:, 0]


def _captions(relation_B: Tensor, *things: Tensor) -> tuple[Tensor, Tensor]:
    """The words of each scene, and their cells."""
    kind_BG, colour_BG, pair_BG, cell_BG = things
    captions = torch.full((len(relation_B), MOST_WORDS), PAD)
    cells = torch.full_like(captions, -1)
    between = {0: [END], 1: [_LEFT, _OF], 2: [_ABOVE]}
    named_BG3 = torch.stack([pair_BG + _A, colour_BG + _COLOUR, kind_BG + torch.where(pair_BG == 1, _MANY, _ONE)], 2)
    for scene, relation in enumerate(relation_B.tolist()):
        words, where = named_BG3[scene, 0].tolist() + between[relation], [-1, *[int(cell_BG[scene, 0])] * 2]
        if relation:
            where += [-1] * (len(words) - 3) + [-1, *[int(cell_BG[scene, 1])] * 2]
            words += [*named_BG3[scene, 1].tolist(), END]
        captions[scene, : len(words)] = torch.tensor(words)
        cells[scene, : len(where)] = torch.tensor(where)
    return captions, cells
