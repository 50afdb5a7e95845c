"""Whether a model looks where people look: its maps against the fixations of people, beside what chance gives.

| row | |
|---|---|
| each map | NSS, AUC, CC, SIM, KL and rank correlation with the density of fixations; sAUC with fixations elsewhere |
| centre | a Gaussian in the middle, which beats many models where people look at the middle |
| random | blurred noise |
| people | each person's fixations under the density of the others': as high as a map can be hoped to be |

Shape letters: P maps, H, W image, h, w map, N fixations, M tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain import gaze
from saccade.explain.explanation import explain
from saccade.explain.faithfulness import agreement
from saccade.extras import new_figure
from saccade.ops.saliency import correlation, divergence, scanpath_saliency, similarity
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: which way is better
BETTER = {"nss": 1, "cc": 1, "sim": 1, "kl": -1, "rank": 1, "auc": 1, "sauc": 1}


@dataclass
class GazeAgreement:
    """Maps beside each other and beside chance.

    Attributes:
        figures: measure -> its value for each map, (P,).
        names: of the maps, in order.
        maps: (P, H, W), at the size of the fixations.
        density: of the fixations, (H, W).
        people: NSS and AUC of people, each by the others; none where there is one or they are not told apart.
    """

    figures: dict[str, Tensor]
    names: tuple[str, ...]
    maps: Tensor
    density: Tensor
    people: dict[str, float] = field(default_factory=dict)

    def best(self, measure: str = "nss") -> str:
        """The map that agrees most, chance among them.

        Args:
            measure: of `BETTER`.
        """
        return self.names[int((BETTER[measure] * self.figures[measure]).argmax())]

    def beyond_chance(self, measure: str = "nss") -> list[str]:
        """The maps that agree better than both the centre and noise.

        Args:
            measure: of `BETTER`.
        """
        value = dict(zip(self.names, (BETTER[measure] * self.figures[measure]).tolist(), strict=True))
        chance = [value.pop(name) for name in ("centre", "random") if name in value]
        return [name for name, each in value.items() if all(each > other for other in chance)]

    def table(self) -> str:
        """A line a map, people last."""
        rows = [
            (name, *(f"{float(each[p]):.3f}" for each in self.figures.values())) for p, name in enumerate(self.names)
        ]
        if self.people:
            rows.append(("people", *(f"{self.people[m]:.3f}" if m in self.people else "" for m in self.figures)))
        arrows = {1: "↑", -1: "↓"}
        return table(("map", *(f"{name} {arrows[BETTER[name]]}" for name in self.figures)), rows)

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Figure:
        """The density of fixations and the maps beside it.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        shown = {"people": self.density, **dict(zip(self.names, self.maps, strict=True))}
        figure = new_figure(2.2 * len(shown), 2.4)
        for axis, (name, each) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
            axis.imshow(each.detach().float(), cmap="magma")
            axis.set_title(name, fontsize=9)
            axis.set_axis_off()
        return figure


class AgreementWithGaze(nn.Module):
    """Maps (P, h, w) against where people fixated (H, W).

    Args:
        sigma: of the blur of fixations in pixels, a degree of the visual field; 0.035 of the longer side where None.
        chance: the centre and noise stand beside the maps.
        seed: of the noise.

    Raises:
        ValueError: if sigma is not positive.
    """

    def __init__(self, sigma: float | None = None, *, chance: bool = True, seed: int = 0) -> None:
        super().__init__()
        if sigma is not None and not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        self.sigma, self.chance, self.seed = sigma, chance, seed

    def forward(
        self,
        maps_Phw: Tensor,
        fixations_HW: Tensor,
        *,
        names: Sequence[str] | None = None,
        others_HW: Tensor | None = None,
        people: Sequence[Tensor] = (),
    ) -> GazeAgreement:
        """
        Args:
            maps_Phw: not negative; brought to the size of the fixations, bilinearly.
            fixations_HW: how many there are in each pixel.
            names: of the maps; numbers where None.
            others_HW: how many fixations of other images there are in each pixel; without, there is no `sauc`.
            people: (N, 2 or 3) for each person, of the same fixations, for the line of people.

        Raises:
            ValueError: if the shapes do not fit, or nobody fixated anything.
        """
        if maps_Phw.ndim != 3 or fixations_HW.ndim != 2 or not (fixations_HW > 0).any():
            given = f"{tuple(maps_Phw.shape)} and {tuple(fixations_HW.shape)}"
            raise ValueError(f"maps must be (maps, height, width), fixations (height, width) with one, got {given}")
        names = tuple(map(str, range(len(maps_Phw)))) if names is None else tuple(names)
        if len(names) != len(maps_Phw):
            raise ValueError(f"names must be one for each of {len(maps_Phw)} maps, got {len(names)}")
        size = (fixations_HW.shape[0], fixations_HW.shape[1])
        wide = torch.promote_types(maps_Phw.dtype, torch.float32)
        density_HW = gaze.blurred(fixations_HW, self.sigma)
        maps_PHW = F.interpolate(maps_Phw[None].to(wide), size, mode="bilinear", align_corners=False)[0]
        if self.chance:
            maps_PHW = torch.cat([maps_PHW, self._by_chance(size).to(maps_PHW)])
            names = (*names, "centre", "random")
        rows_PN, g_PN = maps_PHW.flatten(1), density_HW.to(maps_PHW).flatten().expand(len(maps_PHW), -1)
        figures = {
            "nss": scanpath_saliency(rows_PN, (fixations_HW > 0).flatten()[None], correction=0),
            "cc": correlation(rows_PN, g_PN),
            "sim": similarity(rows_PN, g_PN),
            "kl": divergence(rows_PN, g_PN),
        }
        with torch.no_grad():
            figures["rank"] = torch.stack([_rank_correlation(row, g_PN[0]) for row in rows_PN])
            figures["auc"] = rows_PN.new_tensor([gaze.auc_judd(each, fixations_HW) for each in maps_PHW])
            if others_HW is not None:
                values = [gaze.shuffled_auc(each, fixations_HW, others_HW) for each in maps_PHW]
                figures["sauc"] = rows_PN.new_tensor(values)
        said = {name: value.to(maps_Phw.dtype) for name, value in figures.items()}
        return GazeAgreement(said, names, maps_PHW, density_HW, self._of_people(people, size))

    def _by_chance(self, size: tuple[int, int]) -> Tensor:
        height, width = size
        generator = torch.Generator().manual_seed(self.seed)
        middle, drawn = (torch.zeros(height * width, dtype=torch.double, device="cpu") for _ in range(2))
        middle[height // 2 * width + width // 2] = 1
        drawn[torch.randperm(len(drawn), generator=generator, device="cpu")[: 1 + len(drawn) // 50]] = 1
        return torch.stack([gaze.blurred(middle.view(size), max(size) / 6), gaze.blurred(drawn.view(size), self.sigma)])

    def _of_people(self, people: Sequence[Tensor], size: tuple[int, int]) -> dict[str, float]:
        paths = [path for path in (gaze.on_image(each, size) for each in people) if len(path)]
        if len(paths) < 2:
            return {}
        scores = []
        for i, own in enumerate(paths):
            others = torch.cat([path[:, :2] for j, path in enumerate(paths) if j != i])
            density_HW, at_HW = gaze.density_map(others, size, self.sigma), gaze.fixation_map(own[:, :2], size)
            scores.append((gaze.nss(density_HW, at_HW), gaze.auc_judd(density_HW, at_HW)))
        return {name: sum(each) / len(scores) for name, each in zip(("nss", "auc"), zip(*scores))}


def agreement_with_gaze(
    model: nn.Module | Mapping[str, Tensor],
    inputs: Mapping[str, Tensor] | None,
    paths: Sequence[Tensor],
    size: tuple[int, int],
    *,
    sigma: float | None = None,
    others_HW: Tensor | None = None,
    **options: Any,
) -> GazeAgreement:
    """A model's maps of an image, or any maps, against the scanpaths of people who looked at it.

    Args:
        model: whatever `saccade.explain` reads, of an image; or maps (h, w) by name.
        inputs: of one example, for the model; None with maps.
        paths: of each person (N, 2 or 3), x and y in pixels of the image, and durations.
        size: height and width of the image that people saw, which the model's picture is taken to show whole.
        sigma: of `AgreementWithGaze`.
        others_HW: fixations of other images.
        **options: of `saccade.explain`; faithfulness is measured only with `faithful=True`.

    Raises:
        ValueError: if the model's parts are no patches of one image, or maps and sizes do not fit.
    """
    maps: Mapping[str, Tensor]
    if isinstance(model, nn.Module):
        if inputs is None:
            raise ValueError("a model needs inputs, got None")
        found = explain(model, inputs, **{"faithful": False, **options})
        if found.grid is None:
            raise ValueError("people looked at an image: the model's parts must be patches of one, they are tokens")
        maps = {name: each.view(found.grid) for name, each in found.maps.items()}
    else:
        maps = model
    sizes = {tuple(each.shape) for each in maps.values()}
    if not maps or any(len(shape) != 2 for shape in sizes):
        raise ValueError(f"maps must be some, each (height, width), got {sorted(sizes)}")
    scaled = [gaze.resized(each, size) for each in maps.values()]
    points = torch.cat([gaze.on_image(path, size)[:, :2] for path in paths]) if paths else torch.zeros(0, 2)
    measure = AgreementWithGaze(sigma)
    stacked = torch.stack([(each - each.min()).float() if each.min() < 0 else each.float() for each in scaled])
    counts = gaze.fixation_counts(points, size)
    return measure(stacked, counts, names=tuple(maps), others_HW=others_HW, people=paths)


def agreement_with_reading(relevance: Mapping[str, Tensor], milliseconds_M: Tensor) -> dict[str, float]:
    """Rank correlation of maps over a text's tokens with how long people's eyes rested on each.

    Args:
        relevance: by name, (M,) each, as `saccade.explain(...).maps` of a text.
        milliseconds_M: total reading time of each token.

    Raises:
        ValueError: if lengths differ.

    >>> agreement_with_reading({"raw": torch.tensor([0.1, 0.3, 0.2])}, torch.tensor([90.0, 400.0, 210.0]))
    {'raw': 1.0}
    """
    for name, each in relevance.items():
        if each.shape != milliseconds_M.shape:
            raise ValueError(f"{name} must be {tuple(milliseconds_M.shape)} as the times, got {tuple(each.shape)}")
    return {name: float(_rank_correlation(each, milliseconds_M)) for name, each in relevance.items()}


def _rank_correlation(a_N: Tensor, b_N: Tensor) -> Tensor:
    return agreement({"a": a_N, "b": b_N})[0, 1]
