"""The paper's claim at laptop size: attention highlights and has no sign, LIME knows the side of a word."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from saccade.catalogue import Claim, ClaimResult
from saccade.explain.post_hoc_interpretability.classifier import AttentionClassifier
from saccade.explain.post_hoc_interpretability.lime import lime

if TYPE_CHECKING:
    from saccade.catalogue.lab import Lab, Trial

#: ids: 0 unknown, 1 the class token, then words for, words against, and others
_FOR, _AGAINST, _WORDS, _LENGTH = (2, 7), (7, 12), 40, 24


def _documents(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Documents (B, 24) and whether they have more words for than against."""
    ids_BT = torch.randint(_AGAINST[1], _WORDS, (count, _LENGTH), generator=generator)
    label_B = torch.arange(count) % 2
    for row, label in enumerate(label_B.tolist()):
        places = 1 + torch.randperm(_LENGTH - 1, generator=generator)[:5]
        sides = [_FOR, _AGAINST] if label else [_AGAINST, _FOR]
        more = torch.randint(*sides[0], (3,), generator=generator)
        ids_BT[row, places] = torch.cat([more, torch.randint(*sides[1], (2,), generator=generator)])
    ids_BT[:, 0] = 1
    return ids_BT, label_B


def _claim(lab: Lab) -> ClaimResult:
    """A trained classifier; of held-out documents, how well each explanation tells words for from words against."""
    held, _ = _documents(lab.size(24, 2), lab.held_out())

    def measure(trial: Trial) -> dict[str, float]:
        model = cast(AttentionClassifier, trial.model)
        said = model(held)
        maps = {name: each for name, each in said.maps().items() if name in ("attention mean", "gradient x input")}
        maps["lime limit"] = model.lime_limit(held, 0)
        maps["lime"] = torch.stack([_by_lime(lab, model, ids) for ids in held])
        sides = [(held >= low) & (held < high) for low, high in (_FOR, _AGAINST)]
        others = held >= _AGAINST[1]
        found = {f"{name.replace(' ', '_')}_tells_sides": _ordered(each, *sides) for name, each in maps.items()}
        found |= {
            f"{name.replace(' ', '_')}_finds_words": _ordered(each.abs(), sides[0] | sides[1], others)
            for name, each in maps.items()
        }
        both = torch.stack([maps["lime"][held > 1], maps["lime limit"][held > 1]])
        return found | {"lime_and_its_limit_correlate": float(torch.corrcoef(both)[0, 1])}

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).logits, batch[1])

    def network() -> AttentionClassifier:
        return AttentionClassifier(_WORDS, 32, head_dim=16, value_dim=16, num_heads=4, max_length=_LENGTH)

    measured = lab.forms(
        {"trained": network}, lambda generator: _documents(lab.size(64, 4), generator), measure, 400, loss=loss, lr=3e-3
    ).means("{figure}")
    return ClaimResult(
        measured,
        holds=measured["lime_tells_sides"] > 0.9
        and measured["lime_and_its_limit_correlate"] > 0.8
        and measured["attention_mean_tells_sides"] < 0.75,
        note="the share of pairs of words that an explanation orders rightly: 0.5 is chance",
    )


def _by_lime(lab: Lab, model: AttentionClassifier, ids_T: Tensor) -> Tensor:
    """LIME's coefficients at the positions of a document."""
    words, place_T = ids_T[1:].unique(return_inverse=True)

    def score(kept_Sd: Tensor) -> Tensor:
        kept_ST = torch.cat([torch.ones(len(kept_Sd), 1, dtype=torch.bool), kept_Sd[:, place_T]], 1)
        return model.logits(model.embedded(torch.where(kept_ST, ids_T, 0)))[:, 1]

    found, _ = lime(score, len(words), samples=lab.size(1000, 40), generator=lab.generator())
    return torch.cat([torch.zeros(1), found[place_T]])


def _ordered(relevance: Tensor, higher: Tensor, lower: Tensor) -> float:
    """The share of pairs within documents of which the first is above the second."""
    shares = [
        (row[up][:, None] > row[down]).float().mean()
        for row, up, down in zip(relevance, higher, lower, strict=True)
        if up.any() and down.any()
    ]
    return float(torch.stack(shares).mean())


CLAIM = Claim(
    paper="attention explanations have no sign and do not know the classifier; gradients and LIME do, and LIME's "
    "coefficients are differences of attention-weighted values",
    expected="LIME tells words for a class from words against it in nine pairs of ten and correlates with its closed "
    "form; attention hardly does",
    run=_claim,
)
