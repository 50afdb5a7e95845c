"""Examples in which it is known what decides: words among words, a form among forms.

Shape letters: B batch, N tokens, F families of words, K classes, P pieces of evidence, H, W image, S slots, s pixels of
a slot.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

#: families of words, of which the last token asks for one, and classes, each a word in every family
FAMILIES, CLASSES = 4, 4
#: words that belong to no family
FILLERS = 11
#: tokens by number: nothing, a word of family f and class c at 1 + K f + c, then F that ask, then fillers
BLANK = 0
ASKING = 1 + FAMILIES * CLASSES
PLANTED_WORDS = ASKING + FAMILIES + FILLERS

#: forms of 5 x 5 pixels by class; all have as much ink
_FORMS = (
    ("..#..", "..#..", "#####", "..#..", "..#.."),
    ("#...#", ".#.#.", "..#..", ".#.#.", "#...#"),
    ("#....", "#....", "#....", "#....", "#####"),
    ("#####", "..#..", "..#..", "..#..", "..#.."),
)
#: pixels of the side of a form's place
SLOT = 6
#: scrambled forms beside the one that decides, at most
_OTHERS = 6


class PlantedTokens(NamedTuple):
    """
    Attributes:
        tokens: (B, N); the last one asks.
        labels: (B,), classes.
        evidence: (B, N) bool, the words that decide; the one that asks is not among them.
    """

    tokens: Tensor
    labels: Tensor
    evidence: Tensor


class PlantedShapes(NamedTuple):
    """
    Attributes:
        images: (B, 1, H, W); 0 is empty.
        labels: (B,), classes.
        evidence: (B, H, W) bool, the pixels of the form that decides.
    """

    images: Tensor
    labels: Tensor
    evidence: Tensor


def planted_tokens(batch: int, length: int, pieces: int, generator: torch.Generator | None = None) -> PlantedTokens:
    """Rows in which P words of each family stand at random places, all of a family of one class, and whose last token
    asks for a family: the label is the class of that family's words, and these alone decide.

    Words of the other families say classes too, drawn by themselves; the other places are filled, each with a chance
    of the row's own, between none and all, with words of no family. So a word that is taken away (`BLANK`) leaves
    nothing that was not seen.

    Args:
        batch: B.
        length: N.
        pieces: P.
        generator: of all that is drawn; torch's global one where None.

    Raises:
        ValueError: if the words do not fit the length.

    >>> row = planted_tokens(1, 12, 1, torch.Generator().manual_seed(0))
    >>> asked, word = int(row.tokens[0, -1]) - ASKING, int(row.tokens[row.evidence])
    >>> (word - 1) // CLASSES == asked, (word - 1) % CLASSES == int(row.labels)
    (True, True)
    """
    if batch < 1 or pieces < 1 or length < FAMILIES * pieces + 2:
        most = f"at least {FAMILIES} x pieces + 2 ({FAMILIES * pieces + 2})"
        raise ValueError(f"batch and pieces must be positive and length {most}, got {batch}, {pieces} and {length}")

    def below(most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=generator)

    filled_BN = torch.rand(batch, length, generator=generator) < torch.rand(batch, 1, generator=generator)
    tokens_BN = torch.where(filled_BN, ASKING + FAMILIES + below(FILLERS, batch, length), BLANK)
    place_BFP = torch.rand(batch, length - 1, generator=generator).argsort(1)[:, : FAMILIES * pieces]
    place_BFP = place_BFP.view(batch, FAMILIES, pieces)
    class_BF, asked_B = below(CLASSES, batch, FAMILIES), below(FAMILIES, batch)
    word_BF = 1 + CLASSES * torch.arange(FAMILIES) + class_BF
    tokens_BN.scatter_(1, place_BFP.flatten(1), word_BF.repeat_interleave(pieces, 1))
    tokens_BN[:, -1] = ASKING + asked_B
    rows = torch.arange(batch)
    evidence_BN = torch.zeros(batch, length, dtype=torch.bool).scatter_(1, place_BFP[rows, asked_B], True)
    return PlantedTokens(tokens_BN, class_BF[rows, asked_B], evidence_BN)


def planted_shapes(batch: int, side: int, generator: torch.Generator | None = None) -> PlantedShapes:
    """Images with one small form, which decides, among others of the same ink whose pixels are scrambled.

    Forms stand in squares of 6 pixels, shifted by up to one, as bright as 0.6 to 1; there is noise over all.

    Args:
        batch: B.
        side: H = W, a multiple of 6.
        generator: of all that is drawn; torch's global one where None.

    Raises:
        ValueError: if the side is none.
    """
    if batch < 1 or side < 2 * SLOT or side % SLOT:
        sides = f"a multiple of {SLOT} from {2 * SLOT} on"
        raise ValueError(f"batch must be positive and side {sides}, got {batch} and {side}")
    forms_K25 = torch.tensor([[[pixel == "#" for pixel in row] for row in form] for form in _FORMS]).flatten(1)
    S, width = (side // SLOT) ** 2, len(_FORMS[0])

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    label_B = torch.randint(len(forms_K25), (batch,), generator=generator)
    # every slot has scrambled ink, and its number in a random order; the first has the form instead
    ink_BSP = torch.rand(batch, S, width**2, generator=generator).argsort(-1) < int(forms_K25[0].sum())
    order_BS = random(batch, S).argsort(-1)
    count_B1 = torch.randint(min(_OTHERS, S - 1) + 1, (batch, 1), generator=generator)
    decides_BS = order_BS == 0
    ink_BSP = (
        torch.where(decides_BS[..., None], forms_K25[label_B][:, None], ink_BSP) & (order_BS <= count_B1)[..., None]
    )
    shift_BS2 = torch.randint(SLOT - width + 1, (batch, S, 2), generator=generator)
    pixel_P = torch.arange(width**2)
    place_BSP = (shift_BS2[..., :1] + pixel_P // width) * SLOT + shift_BS2[..., 1:] + pixel_P % width
    slots_BSs = torch.zeros(batch, S, SLOT**2, dtype=torch.bool).scatter_(2, place_BSP, ink_BSP)
    bright_BS1 = 0.6 + 0.4 * random(batch, S, 1)
    images_BHW = _joined(slots_BSs * bright_BS1) + 0.1 * random(batch, side, side)
    return PlantedShapes(images_BHW[:, None], label_B, _joined(slots_BSs & decides_BS[..., None]))


def _joined(slots_BSs: Tensor) -> Tensor:
    """Squares side by side, (B, H, W)."""
    count = math.isqrt(slots_BSs.shape[1])
    return slots_BSs.unflatten(2, (SLOT, SLOT)).unflatten(1, (count, count)).transpose(2, 3).flatten(3).flatten(1, 2)
