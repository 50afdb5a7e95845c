"""Concept Fusion: subjects are cut out of their references, put together on other grounds, and named together.

Shape letters: C channels, H, W height and width of the canvas, h, w of a cut-out, J subjects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

#: of a canvas of 1024 pixels, how many stay free around a subject
_MARGIN = 32 / 1024
_TRIES = 50


@dataclass(frozen=True)
class Concept:
    """What a phrase stands for.

    Attributes:
        phrase: "<cat> cat" for a placeholder and its class, "cat" for a class alone.
        images: (C, H, W) each.
        masks: (H, W) each, 1 on the subject.
    """

    phrase: str
    images: Sequence[Tensor]
    masks: Sequence[Tensor]


@dataclass(frozen=True)
class Sample:
    """What is learned from.

    Attributes:
        image: (C, H, W).
        prompt: names the subjects.
        phrases: of the subjects, in the order of their masks.
        masks: (J, H, W), where each is; none overlap.
        fused: whether it was put together.
        prior: whether it shows classes alone.
    """

    image: Tensor
    prompt: str
    phrases: tuple[str, ...]
    masks: Tensor
    fused: bool
    prior: bool = False


@dataclass(frozen=True)
class Place:
    """Where a cut-out goes.

    Attributes:
        height, width: to which it is scaled.
        top, left: of its first pixel.
    """

    height: int
    width: int
    top: int
    left: int


#: sizes of the cut-outs, size of the canvas, generator, whether they are priors -> a place for each
Placement = Callable[[Sequence[tuple[int, int]], tuple[int, int], Generator, bool], list[Place]]


def cut_out(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Image and mask within the mask's box.

    Args:
        image: (C, H, W).
        mask: (H, W), 1 on the subject.

    Raises:
        ValueError: if the mask covers nothing.
    """
    down, across = mask.gt(0).any(1).nonzero()[:, 0], mask.gt(0).any(0).nonzero()[:, 0]
    if not len(down):
        raise ValueError("a subject's mask must cover a pixel at least, got none")
    rows, columns = slice(int(down[0]), int(down[-1]) + 1), slice(int(across[0]), int(across[-1]) + 1)
    return image[:, rows, columns], mask[rows, columns]


def fit(height: int, width: int, canvas: tuple[int, int]) -> float:
    """f_max: by how much a cut-out may grow to fit a half of the canvas, with a margin.

    Args:
        height, width: of the cut-out.
        canvas: H and W.
    """
    margin = _MARGIN * canvas[0]
    return min((canvas[1] / 2 - margin) / width, (canvas[0] - margin) / height)


def halves(
    sizes: Sequence[tuple[int, int]],
    canvas: tuple[int, int],
    generator: Generator,
    prior: bool = False,
    *,
    least: float = 0.75,
) -> list[Place]:
    """Two subjects, one to the left and one to the right, as Seg-Mix places them.

        f ~ U(least, 1) f_max,    left and right edges 1 to W/4 pixels from the canvas's,    height uniform

    Args:
        sizes: height and width of the two cut-outs.
        canvas: H and W.
        generator: of all that is random.
        prior: both at one height.
        least: of f / f_max.

    Raises:
        ValueError: if there are not two.
    """
    if len(sizes) != 2:
        raise ValueError(f"halves must get two subjects, got {len(sizes)}")
    share = _uniform(generator)
    places = []
    for side, (height, width) in enumerate(sizes):
        factor = fit(height, width, canvas) * (least + (1 - least) * _uniform(generator))
        h, w = max(1, int(factor * height)), max(1, int(factor * width))
        share = share if prior else _uniform(generator)
        offset = 1 + int(_uniform(generator) * max(1, canvas[1] // 4))
        left = min(offset, canvas[1] - w) if side == 0 else max(0, canvas[1] - offset - w)
        places.append(Place(h, w, int(share * (canvas[0] - h + 1)), left))
    return places


def scattered(
    sizes: Sequence[tuple[int, int]],
    canvas: tuple[int, int],
    generator: Generator,
    prior: bool = False,
    *,
    scales: tuple[float, float] = (0.3, 0.8),
    overlap: float = 0.2,
) -> list[Place]:
    """Any number of subjects anywhere, which cover at most a share of the smaller of two boxes.

    Args:
        sizes, canvas, generator, prior: as in `halves`.
        scales: of a cut-out's longer side, as shares of the canvas's; subjects that find no place become smaller.
        overlap: that share.
    """
    places: list[Place] = []
    for height, width in sizes:
        low, high = scales
        while True:
            for _ in range(_TRIES):
                factor = (low + (high - low) * _uniform(generator)) * min(canvas[0] / height, canvas[1] / width)
                h, w = (min(side, max(1, int(factor * n))) for n, side in zip((height, width), canvas))
                top, left = (int(_uniform(generator) * (side - n + 1)) for n, side in zip((h, w), canvas))
                place = Place(h, w, top, left)
                if h * w == 1 or all(_shared(place, other) <= overlap for other in places):
                    break
            else:
                low, high = low / 2, high / 2
                continue
            places.append(place)
            break
    return places


def compose(
    subjects: Sequence[tuple[Tensor, Tensor]],
    ground: Tensor,
    generator: Generator,
    *,
    placement: Placement = halves,
    prior: bool = False,
) -> tuple[Tensor, Tensor]:
    """Subjects on a ground: the image (C, H, W), and the mask of each (J, H, W), 0 where another lies on it.

    Args:
        subjects: image (C, h, w) and mask (h, w) of each; cut out here.
        ground: (C, H, W), which is outside of the masks as it was.
        generator: of the places, and of which subject lies above.
        placement: `halves`, `scattered`, or a function like them.
        prior: handed to it.

    Raises:
        ValueError: if a mask covers nothing, or the placement takes another number.
    """
    canvas = ground.shape[1], ground.shape[2]
    cuts = [cut_out(*subject) for subject in subjects]
    places = placement([tuple(mask.shape) for _, mask in cuts], canvas, generator, prior)  # type: ignore[misc]
    image, masks = ground.clone(), torch.zeros(len(cuts), *canvas, device=ground.device)
    for j in torch.randperm(len(cuts), generator=generator).tolist():
        (cut, mask), place = cuts[j], places[j]
        size = (place.height, place.width)
        grown = F.interpolate(cut[None], size, mode="bilinear", antialias=True)[0]
        covered = F.interpolate(mask[None, None].to(ground.dtype), size, mode="nearest-exact")[0, 0] > 0.5
        rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
        image[:, rows, columns] = torch.where(covered, grown, image[:, rows, columns])
        masks[:, rows, columns] *= ~covered
        masks[j, rows, columns] = covered.to(masks.dtype)
    return image, masks


def emptied(image: Tensor, mask: Tensor) -> Tensor:
    """A reference's ground: its subject is filled with the mean of what is around it.

    Args:
        image: (C, H, W).
        mask: (H, W), 1 on the subject.
    """
    around = (mask <= 0).to(image.dtype)
    mean_C = (image * around).sum((1, 2)) / around.sum().clamp(min=1)
    return torch.where(mask > 0, mean_C[:, None, None], image)


@dataclass
class ConceptFusion:
    """Draws samples of concepts, and of their classes alone.

    Attributes:
        concepts: to be learned.
        priors: their classes, as the frozen model draws them (100 images each).
        p_fuse: probability that a sample is put together; 0 gives references alone.
        grounds: probabilities of a reference's ground, of a prior's, and of white.
        placement: see `compose`.
        filled: grounds of references are `emptied`; False leaves the subject in them.
        size: H and W of what is put together; None: those of the ground.

    Raises:
        ValueError: if there is no concept, or a probability is none.
    """

    concepts: Sequence[Concept]
    priors: Sequence[Concept] = ()
    p_fuse: float = 0.3
    grounds: tuple[float, float, float] = (0.4, 0.4, 0.2)
    placement: Placement = halves
    filled: bool = True
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not self.concepts:
            raise ValueError("concepts must be one at least, got none")
        if not 0 <= self.p_fuse <= 1 or min(self.grounds) < 0 or sum(self.grounds) <= 0:
            raise ValueError(f"p_fuse and grounds must be probabilities, got {self.p_fuse} and {self.grounds}")

    def draw(self, generator: Generator, *, prior: bool = False, subjects: int = 2) -> Sample:
        """A sample.

        Args:
            generator: of all that is random.
            prior: of the classes alone.
            subjects: of a sample that is put together, whose order is drawn too.

        Raises:
            ValueError: if there are no priors and one is asked for.
        """
        among = self.priors if prior else self.concepts
        if not among:
            raise ValueError("a sample of classes alone must be drawn from priors, and there are none")
        if len(among) < 2 or _uniform(generator) >= self.p_fuse:
            concept = among[_index(len(among), generator)]
            at = _index(len(concept.images), generator)
            image, mask = concept.images[at], concept.masks[at]
            return Sample(image, f"a photo of a {concept.phrase}", (concept.phrase,), mask[None].float(), False, prior)
        chosen = [among[i] for i in torch.randperm(len(among), generator=generator)[:subjects].tolist()]
        pairs = [(each.images[at], each.masks[at]) for each in chosen for at in [_index(len(each.images), generator)]]
        ground = self.ground(pairs[0][0], generator)
        image, masks = compose(pairs, ground, generator, placement=self.placement, prior=prior)
        phrases = tuple(each.phrase for each in chosen)
        return Sample(
            image, "a photo of " + " and ".join(f"a {phrase}" for phrase in phrases), phrases, masks, True, prior
        )

    def ground(self, like: Tensor, generator: Generator) -> Tensor:
        """What a sample is put together on; white, where `like` tells the size, and there are no priors for theirs."""
        kind = int(torch.multinomial(torch.tensor(self.grounds, dtype=torch.float), 1, generator=generator))
        among = (self.concepts, self.priors, ())[kind]
        size = self.size or (like.shape[1], like.shape[2])
        if not among:
            return torch.ones(like.shape[0], *size)
        concept = among[_index(len(among), generator)]
        at = _index(len(concept.images), generator)
        image = emptied(concept.images[at], concept.masks[at]) if self.filled else concept.images[at]
        return (
            image if image.shape[1:] == size else F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
        )


def _shared(a: Place, b: Place) -> float:
    """The share of the smaller box that both cover."""
    down = min(a.top + a.height, b.top + b.height) - max(a.top, b.top)
    across = min(a.left + a.width, b.left + b.width) - max(a.left, b.left)
    return max(0, down) * max(0, across) / min(a.height * a.width, b.height * b.width)


def _uniform(generator: Generator) -> float:
    return float(torch.rand((), generator=generator))


def _index(count: int, generator: Generator) -> int:
    return int(torch.randint(count, (), generator=generator))
