"""The survey's report on interpretability at laptop size: a reader whose weights explain, one whose weights do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.explain.attentive_survey.probes import AttentionReader, interpretability

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

_WORDS, _LENGTH, _WIDTH, _EVIDENCE = 40, 16, 16, 4


class _Recurrent(nn.Module):
    """A recurrence in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(_WIDTH, _WIDTH // 2, batch_first=True, bidirectional=True)

    def forward(self, x_BNC: Tensor) -> Tensor:
        return self.rnn(x_BNC)[0]


class _Classifier(nn.Module):
    """Numbers of words to the logits of two classes."""

    def __init__(self, encoder: nn.Module | None) -> None:
        super().__init__()
        self.embed, self.reader = nn.Embedding(_WORDS, _WIDTH), AttentionReader(_WIDTH, 2, encoder=encoder)

    def forward(self, ids_BN: Tensor) -> Tensor:
        return self.reader(self.embed(ids_BN))[0]


def _documents(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Words without a meaning, among them one to three of the few that tell the class."""
    label_B = torch.randint(2, (batch,), generator=generator)
    ids_BN = torch.randint(2 * _EVIDENCE, _WORDS, (batch, _LENGTH), generator=generator)
    said_BN = torch.randint(_EVIDENCE, (batch, _LENGTH), generator=generator) + _EVIDENCE * label_B[:, None]
    order_BN = torch.rand(batch, _LENGTH, generator=generator).argsort(1)
    count_B1 = torch.randint(1, 4, (batch, 1), generator=generator)
    return torch.where(order_BN < count_B1, said_BN, ids_BN), label_B


def _claim(lab: Lab) -> ClaimResult:
    """The same documents read with weights on the words themselves, and on what a recurrence made of them."""
    held_out = _documents(lab.size(128, 4), lab.held_out())

    def measure(trial: Trial) -> dict[str, float]:
        model: nn.Module = trial.model
        x_BNC = model.embed(held_out[0])  # type: ignore[operator]
        probed = interpretability(
            model.reader,  # type: ignore[arg-type]
            x_BNC,
            permutations=lab.size(50, 2),
            generator=lab.generator(),
        )
        return {"accuracy": lab.accuracy(model, held_out)} | probed.figures()

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    forms = {"words": lambda: _Classifier(None), "recurrent": lambda: _Classifier(_Recurrent())}
    batch = lab.size(64, 4)
    measured = lab.forms(
        forms, lambda generator: _documents(batch, generator), measure, 400, loss=loss, lr=1e-2, seeds=2
    ).means()
    weaker = [
        measured[f"words_{probe}"] > measured[f"recurrent_{probe}"]
        for probe in ("tau_gradient", "tau_left_out", "permuted")
    ]
    return ClaimResult(
        measured,
        holds=all(weaker) and min(measured["words_accuracy"], measured["recurrent_accuracy"]) > 0.9,
        note="tau is Kendall's, of weights and importance; permuted and adversarial changes of probabilities and of "
        "weights, from 0 to 1",
    )


CLAIM = Claim(
    paper="attention is read as an explanation, and the critics' findings: weights correlate weakly with importance by "
    "gradients, other weights give the same prediction; in defence, it depends on the model",
    expected="with weights on the words themselves they follow importance, and permuting them changes what is said; on "
    "the states of a recurrence that is right as often, both less",
    run=_claim,
)
