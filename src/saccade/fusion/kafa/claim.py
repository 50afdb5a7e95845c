"""The paper's claim at laptop size: what an ad says is told by picture, words and knowledge together."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.fusion.kafa.adapter import CLIPAdapter, FeatureAdapter
from saccade.fusion.kafa.matching import matching_logits, matching_loss, statement_figures

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: width of features, and of the part of it in which messages lie; statements of an ad; noise; share of wrong features
_DIM, _INNER, _STATEMENTS, _NOISE, _WRONG = 64, 8, 15, 0.3, 0.4
_SCALE = torch.tensor(20.0).log()

Batch = tuple[Tensor, Tensor]


def _ads(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Three unit vectors of each message (B, 3, D), and the features of picture, words and knowledge, one in each.

    A feature may tell of something else, as misread words and wrong brands do; such have a mark of their own.
    """
    parts_2B3D = torch.zeros(2, count, 3, _DIM)
    parts_2B3D[..., :_INNER] = F.normalize(torch.randn(2, count, 3, _INNER, generator=generator), dim=-1)
    parts_B3D, other_B3D = parts_2B3D
    wrong_B31 = torch.rand(count, 3, 1, generator=generator) < _WRONG
    mark_D = F.one_hot(torch.tensor(_INNER), _DIM)
    noise = _NOISE / _DIM**0.5 * torch.randn(count, 3, _DIM, generator=generator)
    return parts_B3D, F.normalize(torch.where(wrong_B31, other_B3D + mark_D, parts_B3D) + noise, dim=-1)


class _Alone(nn.Module):
    """The compared adapter sees the picture alone."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = CLIPAdapter(_DIM)

    def forward(self, *features: Tensor) -> Tensor:
        return self.adapter(features[0])


def _claim(lab: Lab) -> ClaimResult:
    """Accuracy among 15 statements: others' messages, and such as repeat the ad's own words."""
    parts, features = _ads(lab.size(1000, 8), lab.held_out())
    message = F.normalize(parts.sum(1), dim=-1)
    count, generator = len(parts), lab.generator()
    false = torch.stack([torch.roll(message, 1 + step, 0) for step in range(_STATEMENTS - 1)], 1)
    others = torch.zeros(count, _STATEMENTS - 1, 2, _DIM)
    others[..., :_INNER] = F.normalize(torch.randn(*others.shape[:-1], _INNER, generator=generator), dim=-1)
    own_words = F.normalize(others.sum(2) + parts[:, 1:2], dim=-1)
    true = torch.zeros(count, _STATEMENTS, dtype=torch.bool)
    true[:, 0] = True

    def judged(y: Tensor) -> dict[str, float]:
        found = {}
        for name, wrong in (("random", false), ("own_words", own_words)):
            statements = torch.cat([message[:, None], wrong], 1)
            found[f"{name}_percent"] = 100 * statement_figures(matching_logits(y, statements, _SCALE), true)["top1"]
        return found

    def draw(generator: Generator) -> Batch:
        drawn, seen = _ads(lab.size(128, 8), generator)
        return seen, F.normalize(drawn.sum(1), dim=-1)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return matching_loss(cast(Tensor, model(*batch[0].unbind(1))), batch[1], _SCALE)

    def measure(trial: Trial) -> dict[str, float]:
        return judged(trial.model(*features.unbind(1)))

    trials = lab.forms(
        {
            "kafa": lambda: FeatureAdapter(_DIM),
            "query": lambda: FeatureAdapter(_DIM, form="query"),
            "weights": lambda: FeatureAdapter(_DIM, form="weights"),
            "clip_adapter": _Alone,
        },
        draw, measure, 600, loss=loss, lr=2e-3,
    )  # fmt: skip
    measured = dict(trials.means())
    for name, y in (("zero_shot", features[:, 0]), ("words_alone", features[:, 1]), ("average", features.mean(1))):
        measured |= {f"{name}_{figure}": value for figure, value in judged(y).items()}
    return ClaimResult(
        measured,
        holds=measured["kafa_random_percent"]
        > max(measured["zero_shot_random_percent"], measured["average_random_percent"])
        and measured["kafa_own_words_percent"] > measured["average_own_words_percent"]
        and measured["kafa_random_percent"] > measured["clip_adapter_random_percent"],
        note="features that tell of something else have a mark; where all are only noisy, the plain average was as "
        "good as the adapter",
    )


CLAIM = Claim(
    paper="more accurate than the frozen model and than CLIP-Adapter on Pitt's ads (figures not read)",
    expected="generated features, some of them wrong and marked: accuracy above that of the frozen picture, of the "
    "average, and of CLIP-Adapter",
    run=_claim,
)
