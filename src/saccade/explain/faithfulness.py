"""Whether a map of relevance deserves belief: what happens to the score when tokens or patches are taken away.

    f(S)   the score with the parts S alone, f(all) with all of them

| measure | | better |
|---|---|---|
| deletion | mean of f / f(all) while the most relevant go first | lower |
| insertion | mean of f / f(all) while the most relevant come first | higher |
| comprehensiveness | mean over shares k of f(all) - f(all but the top k) (DeYoung et al., arXiv 1911.03429) | higher |
| sufficiency | mean over shares k of f(all) - f(the top k alone) | lower |
| sensitivity-n | correlation of summed relevance and fall of f, over random sets of n parts (Ancona et al., arXiv 1711.06104) | higher |

A random map is measured beside every map: what is no better than it says nothing about the model.

Shape letters: M parts (tokens, patches), S sets of them.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saccade.extras import new_figure
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Faithfulness", "Measures", "agreement", "faithfulness", "overlap", "ranks"]

#: kept (S, M) of bool -> f (S,)
Score = Callable[[Tensor], Tensor]

#: the shares of parts of comprehensiveness and sufficiency
SHARES = (0.05, 0.1, 0.2, 0.5)
#: which way is better
BETTER = {"deletion": -1, "insertion": 1, "comprehensiveness": 1, "sufficiency": -1, "sensitivity": 1}


@dataclass
class Measures:
    """One map's measures; the module's docstring defines them.

    Attributes:
        deletion, insertion, comprehensiveness, sufficiency, sensitivity: the measures.
        deletion_curve, insertion_curve: f / f(all) by the number of parts that went or came, which is in `counts`.
        counts: from none to all.
    """

    deletion: float
    insertion: float
    comprehensiveness: float
    sufficiency: float
    sensitivity: float
    deletion_curve: Tensor
    insertion_curve: Tensor
    counts: Tensor

    def figures(self) -> dict[str, float]:
        """The measures by name."""
        return {name: getattr(self, name) for name in BETTER}


@dataclass
class Faithfulness:
    """Maps of one input beside each other, and beside random ones.

    Attributes:
        maps: by their names.
        floor: those of random maps, one each.
        whole, nothing: f with all parts and with none.
    """

    maps: dict[str, Measures]
    floor: list[Measures]
    whole: float
    nothing: float

    def beyond_chance(self, name: str) -> dict[str, bool]:
        """By measure, whether a map is better than every random one.

        Args:
            name: of the map.
        """
        random = [each.figures() for each in self.floor]
        return {
            measure: all(sign * value > sign * other[measure] for other in random)
            for measure, value in self.maps[name].figures().items()
            for sign in (BETTER[measure],)
        }

    def chance(self) -> dict[str, float]:
        """The measures of random maps, in the mean."""
        return {name: sum(each.figures()[name] for each in self.floor) / len(self.floor) for name in BETTER}

    def believed(self) -> list[str]:
        """The maps that are better than every random one by most measures, the best first.

        Ordered by how many measures say so, then by insertion less deletion.
        """
        votes = {name: sum(self.beyond_chance(name).values()) for name in self.maps}
        chosen = [name for name, count in votes.items() if 2 * count > len(BETTER)]
        return sorted(chosen, key=lambda name: (-votes[name], self.maps[name].deletion - self.maps[name].insertion))

    def table(self) -> str:
        """A line a map, the mean of the random ones last; a star marks what no random map reaches."""
        lines = []
        for name, measures in self.maps.items():
            beyond = self.beyond_chance(name)
            lines.append((name, *(f"{v:.3f}{' *' * beyond[k]}" for k, v in measures.figures().items())))
        lines.append(("random", *(f"{mean:.3f}" for mean in self.chance().values())))
        arrows = {1: "↑", -1: "↓"}
        return table(("map", *(f"{name} {arrows[sign]}" for name, sign in BETTER.items())), lines)

    def plot(self) -> Figure:
        """Curves of deletion and insertion.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(9, 3.4)
        axes = figure.subplots(1, 2, sharey=True)
        for axis, kind in zip(axes, ("deletion", "insertion"), strict=True):
            for each in self.floor:
                axis.plot(each.counts, getattr(each, f"{kind}_curve"), color="0.8", linewidth=1)
            for name, measures in self.maps.items():
                axis.plot(measures.counts, getattr(measures, f"{kind}_curve"), label=name)
            axis.set_title(f"{kind}: the most relevant first")
            axis.set_xlabel("parts")
        axes[0].set_ylabel("score, share of the whole one")
        axes[1].legend()
        return figure


def faithfulness(
    score: Score,
    maps: Mapping[str, Tensor],
    *,
    random: int = 5,
    subsets: int = 64,
    share: float = 0.2,
    steps: int = 16,
    batch: int = 32,
    seed: int = 0,
) -> Faithfulness:
    """Measure maps of one input, beside random ones.

    Args:
        score: what the model says with some of the parts, such as the target's probability: kept (S, M) -> (S,).
        maps: relevance of each part (M,), by name.
        random: how many random maps.
        subsets: random sets of sensitivity-n.
        share: of the parts in each of these, n / M.
        steps: of the curves; every part is one where there are not more.
        batch: sets in one call of `score`.
        seed: of random maps and sets.

    Raises:
        ValueError: if there are no maps, they have not one length, or the score of the whole input is 0.
    """
    lengths = {tuple(relevance.shape) for relevance in maps.values()}
    if len(lengths) != 1 or len(shape := lengths.pop()) != 1 or not shape[0]:
        raise ValueError(f"maps must have one relevance for each part, got {[tuple(x.shape) for x in maps.values()]}")
    if min(random, subsets - 1, steps) < 1 or not 0 < share < 1:
        given = f"{random}, {subsets}, {steps} and {share}"
        raise ValueError(f"random, subsets, steps and share must be at least 1, 2, 1 and in (0, 1), got {given}")
    (M,) = shape
    generator = torch.Generator().manual_seed(seed)

    known: dict[bytes, float] = {}

    @torch.no_grad()
    def scores(kept_SM: Tensor) -> Tensor:
        """Each set is asked for once: of few parts there are few."""
        keys = [row.numpy().tobytes() for row in kept_SM]
        new = {key: i for i, key in enumerate(keys) if key not in known}
        for part in torch.tensor(list(new.values()), dtype=torch.long).split(batch):
            if len(part):
                found = score(kept_SM[part]).detach().float().cpu().tolist()
                known.update((keys[i], value) for i, value in zip(part.tolist(), found, strict=True))
        return torch.tensor([known[key] for key in keys])

    whole, nothing = scores(torch.stack([torch.ones(M), torch.zeros(M)]).bool()).tolist()
    if whole == 0:
        raise ValueError("the score of the whole input is 0: nothing can be explained of it")
    removed_SM = torch.zeros(subsets, M, dtype=torch.bool)
    count = min(max(1, round(share * M)), M)
    for row in removed_SM:
        row[torch.randperm(M, generator=generator)[:count]] = True
    fall_S = whole - scores(~removed_SM)
    counts = torch.linspace(0, M, min(steps, M) + 1).round().int()
    tops = torch.tensor([min(max(1, round(each * M)), M) for each in SHARES])

    def measured(relevance_M: Tensor) -> Measures:
        relevance_M = relevance_M.detach().float().cpu()
        order = relevance_M.argsort(descending=True, stable=True)
        first_SM = torch.zeros(len(counts) + len(tops), M, dtype=torch.bool)
        first_SM[:, order] = torch.arange(M)[None] < torch.cat([counts, tops])[:, None]
        of_first, of_rest = scores(torch.cat([first_SM, ~first_SM])).chunk(2)
        coming, going = (each[: len(counts)] / whole for each in (of_first, of_rest))
        return Measures(
            deletion=float(going.mean()),
            insertion=float(coming.mean()),
            comprehensiveness=float((whole - of_rest[len(counts) :]).mean()),
            sufficiency=float((whole - of_first[len(counts) :]).mean()),
            sensitivity=_correlation((removed_SM * relevance_M).sum(1), fall_S),
            deletion_curve=going,
            insertion_curve=coming,
            counts=counts,
        )

    floor = [measured(torch.rand(M, generator=generator)) for _ in range(random)]
    return Faithfulness({name: measured(relevance) for name, relevance in maps.items()}, floor, whole, nothing)


def agreement(maps: Mapping[str, Tensor]) -> Tensor:
    """Spearman's rank correlation of each two maps, (maps, maps).

    Args:
        maps: relevance (M,), by name.
    """
    ranked = [ranks(relevance.detach().float().flatten()) for relevance in maps.values()]
    rows = [[_correlation(a, b) for b in ranked] for a in ranked]
    return torch.tensor(rows, device=ranked[0].device if ranked else None)


def overlap(first_M: Tensor, second_M: Tensor, share: float = 0.1) -> float:
    """The share of the parts that both maps have among their top ones.

    Args:
        first_M, second_M: relevance.
        share: of the parts that are top ones.
    """
    count = max(1, round(share * len(first_M)))
    chosen: Sequence[set[int]] = [set(each.topk(count).indices.tolist()) for each in (first_M, second_M)]
    return len(chosen[0] & chosen[1]) / count


def ranks(x_M: Tensor) -> Tensor:
    """From 0, the smallest; equal ones have their mean rank.

    Args:
        x_M: figures.
    """
    ordered, position = x_M.unique(return_inverse=True)
    count = torch.bincount(position, minlength=len(ordered)).float()
    return (count.cumsum(0) - (count + 1) / 2)[position]


def _correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's; 0 where one of them is constant."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    norm = float(x.norm() * y.norm())
    return float(x @ y) / norm if norm > 0 else 0.0
