"""Who looks where: people in front of photographs, arrays that are searched, and what stands out of photographs.

Points and boxes are in shares of width and height.

Shape letters: B scenes, P people of a scene, O objects, N objects of an array, T steps of a search, F fixations,
S side of an image, H, W pixels, s side of an object's picture, D draws of a point, K kinds of shapes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saccade.train.data.pictures import crops

#: people of a scene at most, and the radius of a head
PEOPLE, HEAD = 3, 0.09
#: things that one may look at, their radius, and the share of people who look at the one that draws the eye
OBJECTS, THING, ATTENDS = 4, 0.06, 0.75
#: directions among which one that leaves the scene is chosen
_WAYS = 16
#: kinds of objects of an array: shapes, and how they are coloured
KINDS, COLOURS = 4, torch.tensor([[0.9, 0.2, 0.2], [0.2, 0.8, 0.3], [0.25, 0.35, 0.95], [0.95, 0.85, 0.2]])
#: fixations that are drawn about what stands out, and how far they scatter
FIXATIONS, SCATTER = 12, 0.07


class Gazes(NamedTuple):
    """People who look at a thing, or out of the picture.

    Attributes:
        images: (B, 3, S, S) in [0, 1].
        boxes: (B, P, 4), heads as (x0, y0, x1, y1).
        there: (B, P), bool: which people there are.
        directions: (B, P, 2), of their gaze, of unit length.
        inside: (B, P), bool: who looks at the thing; the others look out of the picture.
        targets: (B, 2), the thing.
    """

    images: Tensor
    boxes: Tensor
    there: Tensor
    directions: Tensor
    inside: Tensor
    targets: Tensor


class Searches(NamedTuple):
    """Arrays of objects that were searched for one of them.

    Attributes:
        objects: (B, N, 3, s, s) in [0, 1], row by row.
        targets: (B,), the number of the one that is looked for.
        paths: (B, T), the objects that are looked at, the target last; then N, the stop; then N + 1, nothing.
    """

    objects: Tensor
    targets: Tensor
    paths: Tensor


class Salients(NamedTuple):
    """Photographs with a thing that stands out.

    Attributes:
        images: (B, 3, S, S) in [0, 1].
        centres: (B, 2), its middle.
        fixations: (B, F, 2), drawn about it.
    """

    images: Tensor
    centres: Tensor
    fixations: Tensor


def gazes(count: int, side: int, generator: torch.Generator, photographs: Sequence[Tensor]) -> Gazes:
    """One to three people and four discs before a dimmed window of a photograph; a head has a dark nose ahead.

    One disc draws the eye: three of four people look at it. The others look where there is nothing.

    Args:
        count: B.
        side: S.
        generator: of everything random.
        photographs: (3, H, W) in [0, 1], at least as large as a scene.

    Raises:
        ValueError: if a window does not fit.
    """
    (windows,) = crops([(each,) for each in photographs], count, side, generator, turned=True)
    images = 0.3 + 0.35 * windows
    places = _apart(count, PEOPLE + OBJECTS, HEAD, 2.4 * HEAD, generator)
    heads_BP2, things_BO2 = places[:, :PEOPLE], places[:, PEOPLE:]
    there = torch.arange(PEOPLE) < torch.randint(1, PEOPLE + 1, (count, 1), generator=generator)
    inside = (torch.rand(count, PEOPLE, generator=generator) < ATTENDS) & there
    targets = things_BO2[:, 0]
    to_things_BPO2 = _unit(things_BO2[:, None] - heads_BP2[:, :, None])
    turn = torch.arange(_WAYS) * (2 * math.pi / _WAYS)
    ways_W2 = torch.stack([turn.cos(), turn.sin()], 1)
    away_BP = (to_things_BPO2 @ ways_W2.T).amax(2).argmin(2)
    directions = torch.where(inside[..., None], to_things_BPO2[:, :, 0], ways_W2[away_BP])

    line_S = (torch.arange(side) + 0.5) / side
    at_SS2 = torch.stack(torch.meshgrid(line_S, line_S, indexing="xy"), 2)
    for number in range(OBJECTS):
        away_BSS = (at_SS2 - things_BO2[:, number, None, None]).norm(dim=3)
        colour_B3 = torch.rand(count, 3, generator=generator)
        images = _painted(images, away_BSS < THING, colour_B3)
    for number in range(PEOPLE):
        from_head_BSS2 = at_SS2 - heads_BP2[:, number, None, None]
        there_B11 = there[:, number, None, None]
        along_BSS = (from_head_BSS2 * directions[:, number, None, None]).sum(3)
        head_BSS = (from_head_BSS2.norm(dim=3) < HEAD) & there_B11
        nose_BSS = head_BSS & (along_BSS > 0.35 * from_head_BSS2.norm(dim=3)) & (along_BSS > 0.3 * HEAD)
        skin_B3 = torch.tensor([0.95, 0.8, 0.65]) * (0.85 + 0.15 * torch.rand(count, 1, generator=generator))
        images = _painted(images, head_BSS, skin_B3)
        images = _painted(images, nose_BSS, torch.full((count, 3), 0.05))
    boxes = torch.cat([heads_BP2 - HEAD, heads_BP2 + HEAD], 2).clamp(0, 1)
    return Gazes(images, boxes, there, directions, inside, targets)


def searches(
    count: int, rows: int, columns: int, side: int, generator: torch.Generator, *, guidance: float = 0.0
) -> Searches:
    """Who searches an array looks at the nearest object not yet seen, from its middle on, until the target is found.

    With guidance, an object of another colour than the target's is that much farther, in rows and columns. Of objects
    at one distance the first is looked at.

    Args:
        count: B.
        rows, columns: of the array.
        side: s.
        generator: of objects and targets.
        guidance: what another colour costs.

    Raises:
        ValueError: if there are not two objects at least, or their pictures are smaller than 4 pixels.
    """
    if rows < 1 or columns < 1 or rows * columns < 2 or side < 4:
        raise ValueError(f"there must be two objects of 4 pixels at least, got {rows} x {columns} of {side} pixels")
    number = rows * columns
    kind_BN = torch.randint(KINDS, (count, number), generator=generator)
    colour_BN = torch.randint(len(COLOURS), (count, number), generator=generator)
    targets = torch.randint(number, (count,), generator=generator)
    cover_KHW = shapes(side)
    objects = 0.9 - cover_KHW[kind_BN][:, :, None] * (0.9 - COLOURS[colour_BN][..., None, None])
    place_N2 = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), 2).view(-1, 2)
    other_BN = colour_BN != colour_BN.gather(1, targets[:, None])
    cost_BN = guidance * other_BN.double()
    at_B2 = torch.tensor([rows // 2, columns // 2]).expand(count, 2)
    seen_BN = torch.zeros(count, number, dtype=torch.bool)
    found_B = torch.zeros(count, dtype=torch.bool)
    paths = torch.full((count, number + 1), number + 1)
    for step in range(number + 1):
        paths[found_B & (seen_BN.sum(1) == step), step] = number
        distance_BN = (place_N2[None] - at_B2[:, None]).double().norm(dim=2) + cost_BN
        next_B = distance_BN.masked_fill(seen_BN, math.inf).argmin(1)
        searching_B = ~found_B
        if not searching_B.any():
            break
        paths[searching_B, step] = next_B[searching_B]
        seen_BN[searching_B, next_B[searching_B]] = True
        at_B2 = torch.where(searching_B[:, None], place_N2[next_B], at_B2)
        found_B = found_B | (next_B == targets)
    return Searches(objects, targets, paths)


def salients(count: int, side: int, generator: torch.Generator, photographs: Sequence[Tensor]) -> Salients:
    """Windows of photographs in which one disc has a colour of its own, and two others nearly that of what is there.

    Args:
        count: B.
        side: S.
        generator: of everything random.
        photographs: (3, H, W) in [0, 1], at least as large as a window.

    Raises:
        ValueError: if a window does not fit.
    """
    (images,) = crops([(each,) for each in photographs], count, side, generator, turned=True)
    places = _apart(count, 3, 0.15, 0.3, generator)
    radius_B3 = 0.07 + 0.06 * torch.rand(count, 3, generator=generator)
    line_S = (torch.arange(side) + 0.5) / side
    at_SS2 = torch.stack(torch.meshgrid(line_S, line_S, indexing="xy"), 2)
    mean_B3 = images.mean((2, 3))
    strange_B3 = 1 - mean_B3.round() + 0.2 * (torch.rand(count, 3, generator=generator) - 0.5)
    for number in range(3):
        away_BSS = (at_SS2 - places[:, number, None, None]).norm(dim=3)
        near_B3 = mean_B3 + 0.1 * (torch.rand(count, 3, generator=generator) - 0.5)
        colour_B3 = (strange_B3 if number == 0 else near_B3).clamp(0, 1)
        images = _painted(images, away_BSS < radius_B3[:, number, None, None], colour_B3)
    scatter = SCATTER * torch.randn(count, FIXATIONS, 2, generator=generator)
    return Salients(images, places[:, 0], (places[:, :1] + scatter).clamp(0, 1 - 1e-4))


def _apart(count: int, number: int, edge: float, least: float, generator: torch.Generator) -> Tensor:
    """Points (B, number, 2) that keep away from the edge and, where some of 30 draws do, from each other."""
    points = torch.zeros(count, 0, 2)
    for _ in range(number):
        drawn_BD2 = edge + (1 - 2 * edge) * torch.rand(count, 30, 2, generator=generator)
        if points.shape[1]:
            away_BD = torch.cdist(drawn_BD2, points).amin(2)
            # the first that is far enough, or else the farthest
            best_B = torch.where((away_BD > least).any(1), (away_BD > least).int().argmax(1), away_BD.argmax(1))
        else:
            best_B = torch.zeros(count, dtype=torch.long)
        points = torch.cat([points, drawn_BD2[torch.arange(count), best_B][:, None]], 1)
    return points


def _painted(images_B3SS: Tensor, where_BSS: Tensor, colour_B3: Tensor) -> Tensor:
    return torch.where(where_BSS[:, None], colour_B3[..., None, None], images_B3SS)


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def shapes(side: int) -> Tensor:
    """Disc, square, ring and cross, (4, s, s) of 0 and 1."""
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    x, y = line.expand(side, -1), line[:, None].expand(-1, side)
    away, wide = (x.square() + y.square()).sqrt(), torch.maximum(x.abs(), y.abs())
    near = torch.minimum(x.abs(), y.abs())
    shapes = [away < 0.8, wide < 0.7, (away < 0.85) & (away > 0.4), (wide < 0.8) & (near < 0.3)]
    return torch.stack(shapes).float()
