"""The paper's claim at laptop size: does some word stand in a text twice? A head that may look at equal words knows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.explain.human_guided_patterns.finding import GlobalRelevance
from saccade.explain.human_guided_patterns.network import PatternBlock, PatternEncoder
from saccade.explain.human_guided_patterns.patterns import Predicate, matching, neighbours

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_WORDS, _LENGTH, _HEADS = 48, 16, 4

Batch = tuple[Tensor, Tensor]


def twice(count: int, generator: Generator) -> Batch:
    """Texts (B, 16) of different words, in half of which one stands twice, and which (B,)."""
    ids_BL = torch.rand(count, _WORDS, generator=generator).argsort(1)[:, :_LENGTH]
    label_B = torch.arange(count) % 2
    places = torch.rand(count, _LENGTH, generator=generator).argsort(1)
    row = torch.arange(count)
    copied = ids_BL[row, places[:, 0]]
    ids_BL[row, places[:, 1]] = torch.where(label_B.bool(), copied, ids_BL[row, places[:, 1]])
    return ids_BL, label_B


class _Judge(nn.Module):
    """One block, and a linear layer on the largest of each channel over tokens."""

    def __init__(self, patterns: dict[str, Predicate]) -> None:
        super().__init__()
        self.encoder = PatternEncoder(_WORDS, patterns, dim=64, depth=1, num_heads=_HEADS, positions=_LENGTH, drop=0.0)
        self.head = nn.Linear(64, 2)

    def forward(self, ids_BL: Tensor) -> Tensor:
        return self.head(self.encoder(ids_BL).amax(1))


def _claim(lab: Lab) -> ClaimResult:
    """The same small encoder with the pattern in one of its four heads, with another pattern, and plain."""
    held = twice(lab.size(1000, 8), lab.held_out())
    measure_relevance = GlobalRelevance({"matching": partial(matching, fallback=False)})

    def measure(trial: Trial) -> dict[str, float]:
        model = cast(_Judge, trial.model)
        encoder = model.encoder
        right = (model(held[0]).argmax(1) == held[1]).float().mean()
        block = cast(PatternBlock, encoder.blocks[0])
        weights = block.attention(encoder.embeddings(held[0])).weights  # as the heads would attend without a pattern
        found = measure_relevance(weights, held[0]).relevance[0]
        return {
            "percent": 100 * float(right),
            "steps_to_loss_0.3": float(
                next((i for i, x in enumerate(_smooth(trial.losses)) if x < 0.3), len(trial.losses))
            ),
            "best_head_on_matches": float(found[:, 0].max()),
        }

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    forms = {
        "matching": partial(_Judge, {"matching": matching}),
        "neighbours": partial(_Judge, dict(neighbours())),
        "plain": partial(_Judge, {}),
    }
    measured = lab.forms(forms, partial(twice, lab.size(64, 4)), measure, 200, loss=loss, lr=2e-3, seeds=2).means()
    held_density = float(measure_relevance(torch.ones(len(held[0]), 1, _LENGTH, _LENGTH) / _LENGTH, held[0]).density[0])
    measured["density_of_matches"] = held_density
    return ClaimResult(
        measured,
        holds=measured["matching_percent"] > 90
        and measured["matching_percent"] > measured["plain_percent"] + 5
        and measured["matching_steps_to_loss_0.3"] < measured["plain_steps_to_loss_0.3"],
        note="one block of four heads, of 16 of 48 words; a guess is right in 50 percent; two seeds",
    )


def _smooth(losses: list[float], window: int = 20) -> list[float]:
    """Means of the last losses at each step."""
    return [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]


CLAIM = Claim(
    paper="small models with patterns in their heads beat plain ones of the same size, the more so without pretraining",
    expected="one head that may look at equal words alone learns in a few hundred steps whether a word stands twice; "
    "plain attention, and a pattern of neighbours, are slower",
    run=_claim,
)
