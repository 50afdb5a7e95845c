"""Whether a map depends on what the model has learned: its weights are randomised from the top, layer after layer, and
the map is made again (Adebayo et al., "Sanity checks for saliency maps", arXiv 1810.03292).

    agreement_k = Spearman(|map|, |map with the k upper groups of weights shuffled|)

A map that stays as it was although everything in the model is random shows the input, or the architecture, and not
what was learned. Without labels the same is asked of an embedding: what is explained is then the likeness of the
randomised model's output to itself, and no class or token has a part in it.

Each tensor's entries are shuffled, so that their distribution stays and their order is lost.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from saccade.explain.faithfulness import agreement
from saccade.extras import new_figure
from saccade.layers.wrapping import Report, changing
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SAME", "Sanity", "groups", "sanity"]

#: a map that agrees so far with itself when everything is random has not to do with what was learned
SAME = 0.5


@dataclass
class Sanity:
    """What became of maps as the weights were randomised.

    Attributes:
        stages: which weights were random, in words; each stage has those of the stages before it too, the last all.
        agreement: by map, rank correlation of its size with that of the model as it is, (stages,).
    """

    stages: list[str]
    agreement: dict[str, Tensor]

    def passed(self, name: str) -> bool:
        """Whether a map is another one when all weights are random: its agreement is below `SAME`.

        Args:
            name: of the map.
        """
        return float(self.agreement[name][-1]) < SAME

    def table(self) -> str:
        """A line a map, a column a stage; and whether it depends on what was learned."""
        lines = [
            (name, *(f"{value:.2f}" for value in found.tolist()), "yes" if self.passed(name) else "no")
            for name, found in self.agreement.items()
        ]
        return table(("agreement, random:", *self.stages, "depends on weights"), lines)

    def __str__(self) -> str:
        return self.table()

    def plot(self) -> Figure:
        """Agreement, stage by stage.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(6, 3.4)
        axes = figure.subplots()
        for name, found in self.agreement.items():
            axes.plot(range(len(self.stages) + 1), [1.0, *found.tolist()], marker="o", label=name)
        axes.axhline(SAME, color="0.6", linewidth=0.8)
        axes.set_xticks(range(len(self.stages) + 1), ["none", *self.stages])
        axes.set_xlabel("random, from the top")
        axes.set_ylabel("agreement with the map as it was")
        axes.legend(fontsize=8)
        return figure


def sanity(
    model: nn.Module,
    maps: Callable[[], Mapping[str, Tensor]],
    *,
    stages: int = 4,
    seed: int = 0,
) -> Sanity:
    """Randomise a model from the top, and compare its maps with those before; the model is as it was afterwards.

    Args:
        model: whose maps they are.
        maps: makes the maps (M,) of the model as it is at the moment, by name; one whose values are all equal agrees
            with nothing.
        stages: how many times maps are made again; no more than there are groups of weights.
        seed: of the shuffling.

    Raises:
        ValueError: if stages is below 1, or the model has no weights.
    """
    if stages < 1:
        raise ValueError(f"stages must be at least 1, got {stages}")
    upper = groups(model)
    if not upper:
        raise ValueError(f"{type(model).__name__} has no weights that could be randomised")
    ends = sorted({round(len(upper) * (i + 1) / stages) for i in range(stages)} - {0})
    before = {name: relevance.abs() for name, relevance in maps().items()}
    found: dict[str, list[float]] = {name: [] for name in before}
    names, begin = [], 0
    generator = torch.Generator().manual_seed(seed)
    shuffled: dict[int, nn.Parameter] = {}
    with changing(model, Report("randomised")) as changes:
        for end in ends:
            for _, places in upper[begin:end]:
                for module, name in places:
                    weight = module._parameters[name]
                    assert weight is not None
                    if id(weight) not in shuffled:  # tied ones stay tied
                        shuffled[id(weight)] = _shuffled(weight, generator)
                    changes.put(module, name, shuffled[id(weight)])
            names.append("all" if end == len(upper) else f"to {'.'.join(upper[end - 1][0].split('.')[-2:])}")
            begin = end
            for name, relevance in maps().items():
                found[name].append(float(agreement({"before": before[name], "after": relevance.abs()})[0, 1]))
    return Sanity(names, {name: torch.tensor(values) for name, values in found.items()})


def groups(model: nn.Module) -> list[tuple[str, list[tuple[nn.Module, str]]]]:
    """A model's weights as (name, places), the uppermost first: what follows the layers, each layer, what precedes.

    The layers are the members of its lists of modules, in the order in which the model has them; of a model with
    several towers those of the last tower come first.

    Args:
        model: any network.
    """
    found: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        numbered = re.match(r"(?:.*?\.)??\d+(?=\.|$)", path)
        for name, weight in module._parameters.items():
            if weight is not None:
                found.setdefault(numbered[0] if numbered else _beside(path, found), []).append((module, name))
    return list(reversed(found.items()))


def _beside(path: str, found: Mapping[str, object]) -> str:
    """The name of weights in no layer: of those that precede the first one, or follow the last."""
    return path.partition(".")[0] if found and any(name[-1:].isdecimal() for name in found) else "the input's"


def _shuffled(weight: nn.Parameter, generator: torch.Generator) -> nn.Parameter:
    order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
    return nn.Parameter(weight.detach().flatten()[order].view_as(weight), weight.requires_grad)
