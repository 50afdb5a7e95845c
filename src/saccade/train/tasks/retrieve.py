"""Which picture is asked for, by another picture and a request, or by a description?

Shape letters: B triples, S side of a picture, L words, N held-out triples, G = 2 N pictures of the gallery, D width, C
channels, H, W picture.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from saccade.models.embedding import EmbeddingOutput
from saccade.train.data.composed import ATTRIBUTES, WORDS, Composed, composed
from saccade.train.entries import Entry
from saccade.train.metrics import retrieval
from saccade.train.result import Metric
from saccade.train.tasks.network import NetworkTask, shown
from saccade.train.tasks.settings import Settings

#: of the contrastive losses
TEMPERATURE = 0.07
#: pictures are handed to networks about 0
_MIDDLE, _SPREAD = 0.5, 0.25


class Retrieve(NetworkTask):
    """A picture is searched for by a reference and what is to change in it, or by its description.

    A network is a `saccade.models.retrieval.Retriever`: it embeds pictures, texts, and pictures with texts. One whose
    call takes `description_ids` is also told the description of the reference. It learns by `matching_loss` of
    requests with their targets, and of descriptions with theirs. The gallery holds targets and references of all
    held-out triples, so that whoever finds the reference again is wrong; what is right is any picture of a thing with
    all attributes asked for. Quality is recall@1 of requests; recall@5, nDCG (a picture is worth the number of
    attributes that are as asked for) and recall@1 of descriptions, `text_recall1`, stand beside it.

    Raises:
        ValueError: if the length is no square of a side of 16 pixels at least.
        ImportError: if torchmetrics is not installed, where figures are asked for.
    """

    name = "retrieve"
    metric = Metric("recall1", "recall@1", higher_is_better=True)
    multiple, least = 8, 16
    budgets = {
        "quick": Settings(length=32**2, batch=64, steps=600, lr=2e-3, lengths=(256, 1024, 4096), evaluation_size=192),
        "standard": Settings(
            length=32**2, batch=128, steps=3000, lr=1e-3, lengths=(256, 1024, 4096), evaluation_size=384
        ),
        "long": Settings(
            length=64**2, batch=128, steps=10000, lr=1e-3, lengths=(256, 1024, 4096), evaluation_size=384
        ),
    }  # fmt: skip

    def arguments(self, mechanism: Entry) -> dict[str, Any]:
        """The words that there are, and the side of a picture."""
        return {"vocabulary": len(WORDS), "image_size": self.side}

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        """The tensors of `Composed`; each triple is new, so that those to be judged on are too."""
        return tuple(composed(count, self.side, generator))

    def call(self, model: nn.Module, batch: tuple[Any, ...]) -> EmbeddingOutput:
        """What the network makes of the requests."""
        given = Composed(*batch)
        more = {}
        if "description_ids" in inspect.signature(model.forward).parameters:
            more = {"description_ids": given.description, "description_mask": given.description != 0}
        return model(_about_0(given.reference), given.request, given.request != 0, **more)

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """`matching_loss` of requests and of descriptions with the targets; their mean."""
        given = Composed(*batch)
        target_BD = model(_about_0(given.target)).embedding
        code_B = coded(given.after)
        described = model(input_ids=given.caption, attention_mask=given.caption != 0).embedding
        return (
            matching_loss(self.call(model, batch).embedding, target_BD, code_B)
            + matching_loss(described, target_BD, code_B)
        ) / 2  # fmt: skip

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """`recall1`, `recall5` and `ndcg` of requests, `text_recall1` of descriptions."""
        query_ND, text_ND, gallery_GD, given = self._embedded(model, share)
        after_N4, shown_G4 = given.after, torch.cat([given.after, given.before])
        shared_NG = (after_N4[:, None] == shown_G4).sum(2)
        likeness_NG, relevant_NG = query_ND @ gallery_GD.T, shared_NG == len(ATTRIBUTES)
        return {
            "recall1": retrieval.rank(likeness_NG, relevant_NG),
            "recall5": retrieval.rank(likeness_NG, relevant_NG, k=5),
            "ndcg": retrieval.ndcg(likeness_NG, shared_NG),
            "text_recall1": retrieval.rank(text_ND @ gallery_GD.T, relevant_NG),
        }

    def chance(self) -> float:
        """The share of the gallery that is right, over requests."""
        given = Composed(*self.test)
        return float((coded(given.after)[:, None] == coded(torch.cat([given.after, given.before]))).float().mean())

    @property
    def tokens_per_step(self) -> int:
        """Pixels of references and targets."""
        return 2 * super().tokens_per_step

    def part(self, mechanism: Entry, length: int) -> nn.Module:
        return self.model(mechanism, 0)

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """A picture of some `length` pixels, of sides that 8 divides."""
        side = max(16, 8 * round(math.sqrt(length) / 8))
        return (self._at(_about_0(self.sample()[0][:1]), side, side),)

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """References, what is asked for, and what is found."""
        query_ND, _, gallery_GD, given = self._embedded(model, 1.0)
        found_N = (query_ND @ gallery_GD.T).argmax(1)
        gallery = torch.cat([given.target, given.reference])
        rows = {"reference": given.reference, "asked for": given.target, "found": gallery[found_N]}
        return {name: shown(x) for name, x in rows.items()}

    def _embedded(self, model: nn.Module, share: float) -> tuple[Tensor, Tensor, Tensor, Composed]:
        """Vectors of requests, descriptions and gallery, and the held-out triples."""
        model.eval()
        parts: list[list[Tensor]] = [[], [], [], []]
        kept = []
        for batch in self.held_out(share):
            given = Composed(*batch)
            kept.append(given)
            said = (
                self.call(model, batch),
                model(input_ids=given.caption, attention_mask=given.caption != 0),
                model(_about_0(given.target)),
                model(_about_0(given.reference)),
            )
            for part, output in zip(parts, said):
                part.append(output.embedding.float())
        query, text, target, reference = (torch.cat(part) for part in parts)
        return query, text, torch.cat([target, reference]), Composed(*(torch.cat(x) for x in zip(*kept)))


def coded(attributes_N4: Tensor) -> Tensor:
    """One number for each set of attributes."""
    code_N = torch.zeros_like(attributes_N4[:, 0])
    for values_N, many in zip(attributes_N4.unbind(1), ATTRIBUTES):
        code_N = many * code_N + values_N
    return code_N


def matching_loss(query_BD: Tensor, target_BD: Tensor, code_B: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """-log softmax of q_i . t_i / T over all targets and over all queries, their mean; others of one code do not count.

    Args:
        query_BD, target_BD: of unit length.
        code_B: what the target is; another of the same code is no negative.
        temperature: T.
    """
    score_BB = query_BD.float() @ target_BD.float().T / temperature
    same_BB = (code_B[:, None] == code_B).fill_diagonal_(False)
    score_BB = score_BB.masked_fill(same_BB, -torch.inf)
    return -(score_BB.log_softmax(1).diagonal() + score_BB.log_softmax(0).diagonal()).mean() / 2


def _about_0(image_BCHW: Tensor) -> Tensor:
    return (image_BCHW - _MIDDLE) / _SPREAD
