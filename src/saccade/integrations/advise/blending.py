"""A setting for each head, or for each layer: chosen from what was measured with one setting in all of them.

The settings of a mechanism that were tried, and dense attention, are the choices. Each choice adds to a layer's
relative error and computes a share of its pairs; at a multiplier mu every head (or layer) takes the choice with the
least

    density + mu error

and mu is what makes the mean density the one that is wanted. The errors are those of heads on their own inputs: what
they do to the model's output is measured afterwards.

Shape letters: S choices, the last of them dense; I items, heads or layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from saccade.integrations.advise.advice import Trial
from saccade.integrations.mechanisms import Mechanism


@dataclass(frozen=True)
class Blend:
    """Settings of single layers, in the words of `saccade.switch`.

    Attributes:
        options: of all layers.
        layer_options: path of a layer -> what it has beside them.
        dense_layers: paths of those that stay dense.
    """

    options: Mapping[str, Any]
    layer_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dense_layers: tuple[str, ...] = ()


class Choices:
    """The trials of one mechanism that differ in what may be set per head, or, where it has none, in anything.

    Args:
        entry: the mechanism.
        trials: each of one setting in all layers, with its errors and densities by head.
    """

    def __init__(self, entry: Mechanism, trials: Sequence[Trial]) -> None:
        self.entry, self.trials = entry, trials
        self.per_head = bool(entry.per_head)
        self.places = [place for place in trials[0].heads if all(place in trial.heads for trial in trials)]
        self.width = {place: len(trials[0].heads[place][0]) if self.per_head else 1 for place in self.places}
        items = sum(self.width.values())
        self.error_SI, self.density_SI = torch.zeros(len(trials) + 1, items), torch.ones(len(trials) + 1, items)
        for row, trial in enumerate(trials):
            errors, densities = zip(*(trial.heads[place] for place in self.places), strict=True)
            if self.per_head:
                self.error_SI[row] = torch.tensor([error for each in errors for error in each])
                self.density_SI[row] = torch.tensor([density for each in densities for density in each])
            else:
                self.error_SI[row] = torch.tensor([sum(each) for each in errors])
                self.density_SI[row] = torch.tensor([sum(each) / len(each) for each in densities])

    @property
    def least(self) -> float:
        """The smallest mean density of which there is a blend."""
        return float(self.density_SI.amin(0).mean())

    def pick(self, density: float) -> torch.Tensor:
        """The choices (I,) of least error at a mean density, or a little below it.

        Args:
            density: that is wanted, between `least` and 1.
        """
        sparse, _ = self._around(lambda picked: bool(_picked(self.density_SI, picked).mean() <= density))
        return sparse

    def _around(self, too_little: Callable[[torch.Tensor], bool]) -> tuple[torch.Tensor, torch.Tensor]:
        """The choices (I,) at the largest multiplier that is found to be too little, and at the smallest that is not.

        Args:
            too_little: of choices; true of small multipliers, false of large ones.
        """
        low, high = 1e-9, 1e9
        for _ in range(64):
            mu = (low * high) ** 0.5
            low, high = (mu, high) if too_little(self._at(mu)) else (low, mu)
        return self._at(low), self._at(high)

    def _at(self, mu: float) -> torch.Tensor:
        return (self.density_SI + mu * self.error_SI).argmin(0)

    def density(self, error: float) -> float:
        """The mean density at which the forecast error of a layer is at most so much; what families are ranked by.

        Args:
            error: mean over layers.
        """
        wanted = error * len(self.places)
        _, exact = self._around(lambda picked: bool(_picked(self.error_SI, picked).sum() > wanted))
        return float(_picked(self.density_SI, exact).mean())

    def blend(self, density: float) -> Blend:
        """The settings of every layer at a mean density.

        Args:
            density: as in `pick`.
        """
        picks = dict(zip(self.places, self.pick(density).split(list(self.width.values())), strict=True))
        common = {
            name: value
            for name, value in self.trials[0].options.items()
            if all(name in trial.options and trial.options[name] == value for trial in self.trials)
        }
        dense = tuple(place for place, picked in picks.items() if bool((picked == len(self.trials)).all()))
        own = {}
        for place, picked in picks.items():
            if place in dense:
                continue
            settings = [
                self.trials[i].options if i < len(self.trials) else self.entry.per_head for i in picked.tolist()
            ]
            if self.per_head:
                varied = [name for name in self.trials[0].options if name not in common]
                own[place] = {name: tuple(setting[name] for setting in settings) for name in varied}
            else:
                own[place] = {name: value for name, value in settings[0].items() if name not in common}
        return Blend(common, own, dense)


def _picked(of_SI: torch.Tensor, choices_I: torch.Tensor) -> torch.Tensor:
    return of_SI.gather(0, choices_I[None])


def families(entry: Mechanism, trials: Sequence[Trial]) -> list[Choices]:
    """The trials of a mechanism, by what may be chosen among.

    Args:
        entry: the mechanism.
        trials: of any mechanism.
    """
    groups: dict[Any, list[Trial]] = {}
    for trial in trials:
        if trial.slug == entry.slug and trial.heads and not trial.dense_layers and not trial.layer_options:
            fixed = {name: value for name, value in trial.options.items() if name not in entry.per_head}
            varied = tuple(name for name in trial.options if name in entry.per_head)
            groups.setdefault((repr(fixed), varied) if entry.per_head else None, []).append(trial)
    return [Choices(entry, group) for group in groups.values()]
