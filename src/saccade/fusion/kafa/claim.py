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

#: width of features, and of the part of it in which messages lie; statements of an ad; noise of good and bad features
_DIM, _INNER, _STATEMENTS, _GOOD, _BAD = 64, 24, 15, 0.3, 2.0
_SCALE = torch.tensor(20.0).log()

Batch = tuple[Tensor, Tensor]


def _ads(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Three unit vectors of each message (B, 3, D), and the features of picture, words and knowledge, one in each."""
    parts_B3D = torch.zeros(count, 3, _DIM)
    parts_B3D[..., :_INNER] = F.normalize(torch.randn(count, 3, _INNER, generator=generator), dim=-1)
    bad_B3 = torch.rand(count, 3, generator=generator) < 0.3
    sigma_B31 = torch.where(bad_B3, _BAD, _GOOD)[..., None] / _DIM**0.5
    noise = sigma_B31 * torch.randn(count, 3, _DIM, generator=generator)
    return parts_B3D, F.normalize(parts_B3D + noise, dim=-1)


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
        note="words alone solve what others' messages ask, and not what repeats the ad's own words",
    )


CLAIM = Claim(
    paper="more accurate than the frozen model and than CLIP-Adapter on Pitt's ads (figures not read)",
    expected="generated features: accuracy above that of the frozen picture, of the average, and of CLIP-Adapter",
    run=_claim,
)
