"""The paper's claim at laptop size: which of two numbers in a text is the rating stands in the table."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.fusion.consumer_cross_attention.fusion import ConsumerFusion, Preference
from saccade.fusion.consumer_cross_attention.model import ConsumerModel, Reference, preference_loss

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: words of a text; numbers are words 0 to 9, the two names follow, then words that say nothing
_WORDS, _NAMES, _FILLERS = 20, (10, 11), 20
_DIM, _VARIABLES = 48, 4

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def reviews(count: int, generator: Generator) -> Batch:
    """Texts (B, L) with "a x" and "b y" somewhere, tables (B, F) whose first variable names a or b, the number that it
    names as a rating about 0 (B,), and where that number stands (B,)."""
    ids_BL = torch.randint(12, 12 + _FILLERS, (count, _WORDS), generator=generator)
    slots_B2 = torch.rand(count, _WORDS // 2, generator=generator).argsort(1)[:, :2] * 2
    numbers_B2 = torch.randint(10, (count, 2), generator=generator)
    ids_BL.scatter_(1, slots_B2, torch.tensor(_NAMES).expand(count, 2)).scatter_(1, slots_B2 + 1, numbers_B2)
    switch_B = torch.randint(2, (count,), generator=generator)
    table_BF = torch.randn(count, _VARIABLES, generator=generator)
    table_BF[:, 0] = 2.0 * switch_B - 1
    named = switch_B[:, None]
    rating_B = (numbers_B2.gather(1, named)[:, 0] - 4.5) / 3
    return ids_BL, table_BF, rating_B, slots_B2.gather(1, named)[:, 0] + 1


class _Encoder(nn.Module):
    """A text encoder in small, called as those of transformers: a word's state knows the word before it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12 + _FILLERS, _DIM)
        self.mix = nn.Conv1d(_DIM, _DIM, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        x_BCL = F.pad(self.words(input_ids).mT, (1, 0))
        return SimpleNamespace(last_hidden_state=F.gelu(self.mix(x_BCL)).mT)


def _model(kind: str) -> ConsumerModel:
    sizes: dict[str, Any] = {"dim": _DIM, "variables": _VARIABLES, "drop": 0.0}
    if kind == "cross_attention":
        return ConsumerModel(_Encoder(), ConsumerFusion(**sizes, num_heads=1, hidden=96, head_hidden=64))
    return ConsumerModel(_Encoder(), Reference(**sizes, text=kind, hidden=64))


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    said: Preference = model(*batch[:2])
    return preference_loss(said, batch[2])


def _claim(lab: Lab) -> ClaimResult:
    """Root mean squared error in points of ten, and the attention on the number that the table names."""
    test = reviews(lab.size(1000, 8), lab.held_out())
    ids, table, rating, place = test

    def measure(trial: Trial) -> dict[str, float]:
        model = trial.model
        assert isinstance(model, ConsumerModel)
        found = {"rmse": 3 * float((model(ids, table).prediction[:, 0] - rating).square().mean().sqrt())}
        if isinstance(model.fusion, ConsumerFusion):
            words = model.encoder(input_ids=ids).last_hidden_state
            weights_BL = model.fusion.weights(words, table).mean((1, 2))
            found["on_the_number"] = float(weights_BL.gather(1, place[:, None]).mean())
        return found

    forms = {name: partial(_model, name) for name in ("cross_attention", "mean", "pooled")}

    def draw(generator: Generator) -> Batch:
        return reviews(lab.size(128, 4), generator)

    measured = lab.forms(forms, draw, measure, 800, loss=_loss, lr=2e-3).means()
    others = min(measured["mean_rmse"], measured["pooled_rmse"])
    return ClaimResult(
        measured,
        holds=measured["cross_attention_rmse"] < 0.5 * others and measured["cross_attention_on_the_number"] > 0.9,
        note="the error of knowing nothing is 2.9",
    )


CLAIM = Claim(
    paper="cross attention beats all six reference models, of text, of tables, and of both side by side",
    expected="the error is less than half that of both side by side, with words averaged or pooled, and more than 0.9 "
    "of the attention lies on the number that the table names",
    run=_claim,
)
