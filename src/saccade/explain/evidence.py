"""How well maps of relevance find what is known to decide: planted evidence, among distractors.

| measure | of an example with n of M parts that decide | chance |
|---|---|---|
| auc | the share of pairs (evidence, other part) of which the evidence is the more relevant | 1/2 |
| precision | the share of evidence among the n most relevant parts | n / M |
| rank | the mean place of the evidence, 1 the most relevant part | (M + 1) / 2 |

Parts that are equally relevant count as if they were ordered at random. Beside these stand the measures of
`explain.faithfulness`, and how often that finds a map better than chance (`believed`): whether a map that finds the
evidence is one that deserves belief.

Shape letters: B examples, M parts (tokens, patches), S sets of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.explain.faithfulness import BETTER, faithfulness, ranks
from saccade.extras import new_figure
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FLOOR", "Judgement", "find", "judge"]

#: the name of the random map in a judgement
FLOOR = "random"
#: which way is better
_BETTER = {"auc": 1, "precision": 1, "rank": -1, **BETTER, "believed": 1}


@dataclass
class Judgement:
    """Maps beside each other and beside a random one, in the mean over examples.

    Attributes:
        measures: map -> measure -> figure; the random map is the last one.
    """

    measures: dict[str, dict[str, float]]

    def best(self, measure: str = "auc") -> str:
        """The map that is best by a measure, the random one among them.

        Args:
            measure: of those in the table.
        """
        sign = _BETTER[measure]
        return max(self.measures, key=lambda name: sign * self.measures[name].get(measure, -sign * float("inf")))

    def rows(self) -> dict[str, float]:
        """Every figure under "map: measure"."""
        return {f"{name}: {measure}": value for name, each in self.measures.items() for measure, value in each.items()}

    def table(self) -> str:
        """A line a map."""
        names = list(dict.fromkeys(measure for each in self.measures.values() for measure in each))
        lines = [
            (name, *(f"{each[measure]:.3f}" if measure in each else "-" for measure in names))
            for name, each in self.measures.items()
        ]
        arrows = {1: "↑", -1: "↓"}
        return table(("map", *(f"{name} {arrows[_BETTER[name]]}" for name in names)), lines)

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Figure:
        """The area under the curve of each map, and the random one's as a line.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        found = {name: each["auc"] for name, each in self.measures.items() if name != FLOOR}
        figure = new_figure(6, 0.5 * len(found) + 1)
        axes = figure.subplots()
        axes.barh(list(found), list(found.values()))
        axes.axvline(self.measures[FLOOR]["auc"], color="0.4", linestyle="--")
        axes.invert_yaxis()
        axes.set(xlim=(0, 1), xlabel="pairs of evidence and others that are ordered rightly")
        return figure


def find(relevance_M: Tensor, evidence_M: Tensor) -> dict[str, float]:
    """How well one map finds the evidence of one example: `auc`, `precision`, `rank`.

    Args:
        relevance_M: of each part.
        evidence_M: bool, the parts that decide.

    Raises:
        ValueError: if both are not of one length, or all parts decide, or none.

    >>> find(torch.tensor([0.9, 0.1, 0.5, 0.2]), torch.tensor([True, False, False, True]))
    {'auc': 0.75, 'precision': 0.5, 'rank': 2.0}
    """
    if relevance_M.shape != evidence_M.shape or relevance_M.ndim != 1:
        shapes = f"{tuple(relevance_M.shape)} and {tuple(evidence_M.shape)}"
        raise ValueError(f"relevance and evidence must have one figure for each part, got {shapes}")
    evidence_M, relevance_M = evidence_M.bool().cpu(), relevance_M.detach().float().cpu()
    M, n = len(evidence_M), int(evidence_M.sum())
    if not 0 < n < M:
        raise ValueError(f"evidence must be some parts and not all, got {n} of {M}")
    rank_n = ranks(relevance_M)[evidence_M].double()
    least = relevance_M.topk(n).values[-1]
    above, equal = relevance_M > least, relevance_M == least
    hits = float(evidence_M[above].sum()) + (n - int(above.sum())) * float(evidence_M[equal].double().mean())
    return {
        "auc": (float(rank_n.sum()) - n * (n - 1) / 2) / (n * (M - n)),
        "precision": hits / n,
        "rank": M - float(rank_n.mean()),
    }


def judge(
    maps: Mapping[str, Tensor],
    evidence_BM: Tensor,
    score: Callable[[int, Tensor], Tensor] | None = None,
    *,
    random: int = 3,
    subsets: int = 32,
    steps: int = 8,
    seed: int = 0,
) -> Judgement:
    """Measure maps of several examples whose evidence is known.

    Args:
        maps: relevance (B, M) by name.
        evidence_BM: bool, the parts that decide.
        score: what the model says of an example with some of its parts: (its number, kept (S, M)) -> (S,); without it
            faithfulness is not measured.
        random, subsets, steps, seed: as of `faithfulness`.

    Raises:
        ValueError: if there are no maps, they do not fit the evidence, or one is called "random".
    """
    if not maps or FLOOR in maps:
        raise ValueError(f"there must be maps, none called {FLOOR!r}, got {', '.join(maps) or 'none'}")
    generator = torch.Generator().manual_seed(seed)
    every = {**maps, FLOOR: torch.rand(evidence_BM.shape, generator=generator)}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in every}

    def enter(name: str, figures: Mapping[str, float]) -> None:
        for measure, value in figures.items():
            found[name].setdefault(measure, []).append(value)

    for b, evidence_M in enumerate(evidence_BM):
        for name, relevance_BM in every.items():
            enter(name, find(relevance_BM[b], evidence_M))
        if score is None:
            continue
        measured = faithfulness(
            lambda kept_SM, b=b: score(b, kept_SM),  # type: ignore[misc]
            {name: relevance_BM[b] for name, relevance_BM in maps.items()},
            random=random,
            subsets=subsets,
            steps=steps,
            batch=128,
            seed=seed + b,
        )
        believed = measured.believed()
        for name, each in measured.maps.items():
            enter(name, each.figures() | {"believed": float(name in believed)})
        enter(FLOOR, measured.chance())
    return Judgement(
        {name: {measure: sum(values) / len(values) for measure, values in each.items()} for name, each in found.items()}
    )
