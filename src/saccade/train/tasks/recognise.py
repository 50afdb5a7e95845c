"""Who is it? Faces and handwritten digits are recognised again from several degraded views.

Shape letters: B sets, V views of a set, S side of an image, N held-out sets, D width of an embedding.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.models.embedding import EmbeddingOutput
from saccade.train import data as sources
from saccade.train.data import identities
from saccade.train.data.identities import CONDITIONS
from saccade.train.metrics import retrieval
from saccade.train.result import Metric
from saccade.train.tasks.network import NetworkTask, shown
from saccade.train.tasks.settings import Settings

#: views of a set
VIEWS = 4
#: of scikit-image's faces those that are learned from; the rest is judged on
LEARNED = 70
#: of the contrastive loss
TEMPERATURE = 0.1
#: share of impostors that are accepted
FAR = 1e-2
#: images are handed to networks about 0
_MIDDLE, _SPREAD = 0.5, 0.25


class Recognise(NetworkTask):
    """Which sets of views show the same face, or the same handwritten digit?

    Half of the identities are faces, half single digits (so that another digit of the same class is a hard impostor).
    A set has `VIEWS` views under one of `CONDITIONS`, its attribute; a network takes sets (B, V, 3, S, S) and gives an
    `EmbeddingOutput`. It learns by `contrastive_loss` on identities; where it has several `spaces`, its second space
    learns the condition. What is judged on are other identities, each in every condition: each set is searched for
    among those of all other conditions. Quality is the mAP of identities; rank-1 and TAR at a FAR of 1 % stand beside
    it, and `condition_map`, that of conditions: in the second space, where there is one. In a single space it says how
    much of the condition the embedding still holds.

    Raises:
        ValueError: if the length is no square.
        ImportError: if scikit-image, scikit-learn or torchmetrics is not installed.
    """

    name = "recognise"
    metric = Metric("map", "mAP", higher_is_better=True)
    budgets = {
        "quick": Settings(
            length=32**2, batch=24, steps=300, lr=2e-3, lengths=(1024, 4096, 16384), evaluation_size=160
        ),
        "standard": Settings(
            length=32**2, batch=48, steps=2000, lr=2e-3, lengths=(1024, 4096, 16384), evaluation_size=240
        ),
        "long": Settings(
            length=48**2, batch=64, steps=10000, lr=1e-3, lengths=(1024, 4096, 16384), evaluation_size=240
        ),
    }  # fmt: skip

    @cached_property
    def things(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Faces and digits (N, 1, S, S) that are learned from, and those that are judged on."""
        faces, digits = identities.faces(), sources.digits()
        pairs = ((faces[:LEARNED], digits.train_images), (faces[LEARNED:], digits.test_images))
        learn, judge = (tuple(identities.scaled(x, self.side) for x in pair) for pair in pairs)
        return (learn[0], learn[1]), (judge[0], judge[1])

    def drawn(self, count: int, generator: torch.Generator, judge: bool = False) -> tuple[Tensor, ...]:
        """Sets (B, V, 3, S, S) about 0, and of each the identity and the condition (B, 2).

        To be learned from, an identity has two sets of two conditions; to be judged on, one set of each.
        """
        each = len(CONDITIONS) if judge else 2
        wanted = -(-count // each)
        faces, digits = self.things[judge]
        of_faces = min(len(faces), wanted // 2)
        of_digits = wanted - of_faces
        if judge:  # the first of each, in turn
            in_turn = torch.cat([2 * torch.arange(of_faces) + 1, 2 * torch.arange(of_digits)]).argsort()
            things = torch.cat([faces[:of_faces], digits[:of_digits]])[in_turn]
            condition = torch.arange(each).repeat(len(things))
        else:
            which = torch.randperm(len(faces), generator=generator), torch.randperm(len(digits), generator=generator)
            things = torch.cat([faces[which[0][:of_faces]], digits[which[1][:of_digits]]])
            condition = torch.rand(len(things), len(CONDITIONS), generator=generator).argsort(1)[:, :each].flatten()
        identity = torch.arange(len(things)).repeat_interleave(each)
        views = identities.degraded(things.repeat_interleave(each, 0), condition, VIEWS, generator)
        images = ((views - _MIDDLE) / _SPREAD).expand(-1, -1, 3, -1, -1)
        return images[:count], torch.stack([identity, condition], 1)[:count]

    def loss(self, model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
        """`contrastive_loss` of identities and, in a second space, of conditions; their mean."""
        said: EmbeddingOutput = self.call(model, batch)
        identity, condition = batch[-1].unbind(1)
        losses = [contrastive_loss(said.embedding, identity)]
        if said.spaces is not None:
            losses.append(contrastive_loss(said.spaces[:, 1], condition))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def figures(self, model: nn.Module, share: float = 1.0) -> dict[str, float]:
        """`map`, `rank1`, `tar_at_far` of identities and `condition_map` on held-out sets."""
        model.eval()
        said = [(self.call(model, batch), batch[-1]) for batch in self.held_out(share)]
        embedding = torch.cat([each.embedding for each, _ in said])
        second = torch.cat([each.embedding if each.spaces is None else each.spaces[:, 1] for each, _ in said])
        return scored(embedding, second, torch.cat([truth for _, truth in said]))

    def part_inputs(self, length: int) -> tuple[Any, ...]:
        """A view of two identities, of some `length` pixels."""
        side = max(1, math.isqrt(length))
        return (self._at(self.sample()[0][:2, 0], side, length // side),)

    def chance(self) -> float:
        """The mAP of the mean picture of a set, as it is."""
        images, truth = self.test
        pixels = F.normalize(images[:, :, 0].mean(1).flatten(1), dim=1)
        return scored(pixels, pixels, truth)[self.metric.name]

    @property
    def tokens_per_step(self) -> int:
        """Pixels of all views."""
        return VIEWS * super().tokens_per_step

    @torch.no_grad()
    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """The first view of held-out sets, all views' mean, and the first view of what is found to be nearest."""
        images = self.to_device(self.test)[0]
        model.eval()
        embedding = torch.cat([self.call(model, batch).embedding for batch in self.held_out()])
        nearest = (embedding @ embedding.T).fill_diagonal_(-2.0).argmax(1)
        rows = {"a view": images[:, 0], "mean of views": images.mean(1), "nearest": images[nearest, 0]}
        return {name: shown(x * _SPREAD + _MIDDLE) for name, x in rows.items()}


def scored(embedding_ND: Tensor, second_ND: Tensor, truth_N2: Tensor) -> dict[str, float]:
    """The figures of `Recognise`.

    Args:
        embedding_ND: of unit length, for identities.
        second_ND: of unit length, for conditions.
        truth_N2: identity and condition of each set.
    """
    identity, condition = truth_N2.unbind(1)
    likeness = embedding_ND.float() @ embedding_ND.float().T
    relevant, counts = retrieval.apart(identity, condition)
    alike, others = retrieval.apart(condition, identity)
    return {
        "map": retrieval.mean_average_precision(likeness, relevant, counts),
        "rank1": retrieval.rank(likeness, relevant, counts),
        "tar_at_far": retrieval.tar_at_far(likeness[counts], relevant[counts], FAR),
        "condition_map": retrieval.mean_average_precision(second_ND.float() @ second_ND.float().T, alike, others),
    }


def contrastive_loss(embedding_BD: Tensor, label_B: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """-log softmax over all others of e_i . e_j / T, its mean over each pair of one label (Khosla et al., 2004.11362).

    The mean over the positives of an item is taken outside of the logarithm, then that over items that have any.

    Args:
        embedding_BD: of unit length.
        label_B: of each.
        temperature: T.

    Raises:
        ValueError: if no two have the same label.
    """
    alike_BB = (label_B[:, None] == label_B).fill_diagonal_(False)
    if not alike_BB.any():
        raise ValueError("a batch must have two of one label at least")
    score_BB = embedding_BD.float() @ embedding_BD.float().T / temperature
    itself = torch.eye(len(label_B), dtype=torch.bool, device=label_B.device)
    log_share_BB = score_BB.masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(~alike_BB, 0)
    positives_B = alike_BB.sum(1)
    return -(log_share_BB.sum(1) / positives_B.clamp(min=1))[positives_B > 0].mean()
