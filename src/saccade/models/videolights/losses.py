"""What VideoLights learns by: moments that are matched, saliency of clips in five ways, and one space for both tasks.

Shape letters: B batch, Q queries, G true moments of an item, M matched in a batch, L clips, W words, E contrastive
width, D width, P pairs of clips, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.extras import need
from saccade.layers.objective import Objective
from saccade.models.moments import overlaps, to_ends, to_middles

if TYPE_CHECKING:
    from saccade.models.videolights.network import Trained

#: queries and true moments that belong together, of an item
Match = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Targets:
    """The truth of a batch.

    Attributes:
        spans: of each item the moments (G, 2) as middle and width, shares of the video.
        labels: (B, L), how well each clip answers, from 0 to 12.
        good: bool (B, L), the clips that answer.
        pairs: (B, P, 2), clips of which the first answers better than the second.
        mask: bool (B, L), which clips there are; None for all.
    """

    spans: Sequence[Tensor]
    labels: Tensor
    good: Tensor
    pairs: Tensor
    mask: Tensor | None = None

    @classmethod
    def of(cls, spans: Sequence[Tensor], labels_BL: Tensor, mask_BL: Tensor | None = None, pairs: int = 2) -> Targets:
        """With pairs drawn by torch's generator: a clip that answers, and one that does not; where all do, or none, a
        clip with itself, which teaches nothing.

        Args:
            spans: of each item (G, 2), start and end.
            labels_BL, mask_BL: as above.
            pairs: P.
        """
        there_BL = torch.ones_like(labels_BL, dtype=torch.bool) if mask_BL is None else mask_BL
        good_BL, bad_BL = (labels_BL > 0) & there_BL, (labels_BL == 0) & there_BL
        usable_B1 = (good_BL.any(1) & bad_BL.any(1))[:, None]
        first_BL = torch.zeros_like(good_BL)
        first_BL[:, 0] = True
        drawn = [
            torch.where(usable_B1, each, first_BL).float().multinomial(pairs, replacement=True)
            for each in (good_BL, bad_BL)
        ]
        return cls([to_middles(each) for each in spans], labels_BL, good_BL, torch.stack(drawn, -1), mask_BL)


class SpanMatcher:
    """Each true moment gets the query that costs least, all together: 10 |span - span'|_1 - GIoU - 4 p.

    Args:
        cost_span, cost_giou, cost_class: the three weights.
    """

    def __init__(self, cost_span: float = 10.0, cost_giou: float = 1.0, cost_class: float = 4.0) -> None:
        self.cost_span, self.cost_giou, self.cost_class = cost_span, cost_giou, cost_class

    def cost(self, logits_Q2: Tensor, spans_Q2: Tensor, truth_G2: Tensor) -> Tensor:
        """(Q, G), of one item."""
        span_Q2, truth_G2 = spans_Q2.float(), truth_G2.float()
        far_QG = (span_Q2[:, None] - truth_G2).abs().sum(-1)
        share_QG = overlaps(to_ends(span_Q2), to_ends(truth_G2), generalized=True)
        sure_Q1 = logits_Q2.float().softmax(-1)[:, :1]
        return self.cost_span * far_QG - self.cost_giou * share_QG - self.cost_class * sure_Q1

    @torch.no_grad()
    def __call__(self, logits_BQ2: Tensor, spans_BQ2: Tensor, truth: Sequence[Tensor]) -> list[Match]:
        """The matches of each item, by the number of their query.

        Raises:
            ImportError: where scipy is missing.
        """
        assign, found = need("scipy.optimize", "Hungarian matching").linear_sum_assignment, []
        for logits_Q2, spans_Q2, truth_G2 in zip(logits_BQ2, spans_BQ2, truth, strict=True):
            rows, columns = assign(self.cost(logits_Q2, spans_Q2, truth_G2).cpu().numpy())
            found.append((torch.as_tensor(rows).to(spans_Q2.device), torch.as_tensor(columns).to(spans_Q2.device)))
        return found


class Criterion(nn.Module):
    """10 span + GIoU + 4 label + saliency + 0.2 align; span, GIoU, label and align on each layer of the decoder.

    Args:
        weights: of the terms, in the place of those.
        background: weight of queries without a moment.
        temperature: of the alignment.
        margin: of pairs of clips.
        hard, feedback, similarity: weights within saliency.
        matcher: its own where None.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        background: float = 0.1,
        temperature: float = 0.07,
        margin: float = 0.2,
        hard: float = 10.0,
        feedback: float = 1.0,
        similarity: float = 1.0,
        matcher: SpanMatcher | None = None,
    ) -> None:
        super().__init__()
        self.weights = {"span": 10.0, "giou": 1.0, "label": 4.0, "saliency": 1.0, "align": 0.2, **(weights or {})}
        self.background, self.temperature, self.margin = background, temperature, margin
        self.hard, self.feedback, self.similarity = hard, feedback, similarity
        self.matcher = matcher or SpanMatcher()

    def forward(self, said: Trained, targets: Targets, epoch: int = 0) -> Objective:
        """The loss, and its terms: those of earlier layers end in their number.

        Args:
            said: of the network in training.
            targets: of as many items.
            epoch: from 0; hard terms weigh epoch + 1.

        Raises:
            ValueError: if there are not as many targets, or an item has no moment.
        """
        if len(targets.spans) != len(said.logits) or not all(map(len, targets.spans)):
            raise ValueError(f"targets must hold a moment at least of each of {len(said.logits)} items")
        assert said.queries is not None
        terms = self.of_layer(said, (said.logits, said.pred_spans, said.queries), targets)
        terms["saliency"] = self.of_saliency(said, targets, epoch)
        earlier = said.auxiliary or []
        for number, layer in enumerate(zip(earlier[::3], earlier[1::3], earlier[2::3])):
            of_layer = self.of_layer(said, layer, targets)
            terms |= {f"{name}_{number}": value for name, value in of_layer.items()}
        weighed = [self.weights[name.split("_")[0]] * value for name, value in terms.items()]
        return Objective(torch.stack(weighed).sum(), terms)

    def of_layer(self, said: Trained, layer: tuple[Tensor, Tensor, Tensor], targets: Targets) -> dict[str, Tensor]:
        """`span`, `giou`, `label` and `align` of a layer's logits, spans and queries, matched anew."""
        logits_BQ2, spans_BQ2, queries_BQE = layer
        matches = self.matcher(logits_BQ2, spans_BQ2, targets.spans)
        item_M = torch.cat([torch.full_like(query, number) for number, (query, _) in enumerate(matches)])
        query_M = torch.cat([query for query, _ in matches])
        said_M2 = spans_BQ2[item_M, query_M].float()
        true_M2 = torch.cat([truth[chosen] for truth, (_, chosen) in zip(targets.spans, matches)]).to(said_M2)
        share_M = overlaps(to_ends(said_M2)[:, None], to_ends(true_M2)[:, None], generalized=True)[:, 0, 0]
        matched_BQ = torch.zeros(logits_BQ2.shape[:2], dtype=torch.bool, device=logits_BQ2.device)
        matched_BQ[item_M, query_M] = True
        weight = logits_BQ2.new_tensor([1.0, self.background], dtype=torch.float)
        label = F.cross_entropy(logits_BQ2.float().mT, (~matched_BQ).long(), weight, reduction="none")
        return {
            "span": (said_M2 - true_M2).abs().mean(),
            "giou": 1 - share_M.mean(),
            "label": label.mean(),
            "align": self.of_alignment(said, queries_BQE, matched_BQ, targets),
        }

    def of_alignment(self, said: Trained, queries_BQE: Tensor, matched_BQ: Tensor, targets: Targets) -> Tensor:
        """-log softmax of the matched queries by their likeness to the words, and how unlike the labels the likeness of
        clips and the words' mean is."""
        assert said.words is not None and said.clip_features is not None and said.word_features is not None
        words_BWE = said.words if said.word_mask is None else said.words * said.word_mask[..., None]
        logit_BQ = (queries_BQE @ words_BWE.sum(1)[..., None])[..., 0].float() / self.temperature
        matched = matched_BQ.float()
        nce_B = logit_BQ.logsumexp(1) - (logit_BQ * matched).sum(1) / matched.sum(1)
        mean_B1D = _mean_word(said.word_features, said.word_mask)
        like_BL = F.cosine_similarity(said.clip_features.float(), mean_B1D.float(), dim=-1)
        return nce_B.mean() + unlike(like_BL, targets.labels)

    def of_saliency(self, said: Trained, targets: Targets, epoch: int) -> Tensor:
        """Margin, ranks, neighbour's text, likeness to the labels of both saliencies, and the hard clips."""
        assert said.saliency_neighbour is not None and said.saliency_feedback is not None
        scores, neighbour = said.saliency.float(), said.saliency_neighbour.float()
        there = torch.ones_like(scores) if targets.mask is None else targets.mask.float()
        labels = targets.labels.float()
        good, bad = (scores.gather(1, targets.pairs[..., side]) for side in (0, 1))
        margin = 2 * (self.margin + bad - good).clamp(min=0).mean()
        both = torch.cat([scores * there - 1e3 * (1 - there), neighbour * there - 1e3 * (1 - there)], 1)
        ranks = rank_loss(both, torch.cat([labels, torch.zeros_like(labels)], 1), torch.cat([there, there], 1))
        other = (F.softplus(neighbour) * there).sum(1).mean()
        return (
            margin
            + ranks
            + other
            + self.similarity * unlike(scores, labels)
            + self.feedback * unlike(said.saliency_feedback.float(), labels)
            + self.hard * (epoch + 1) * hard_loss(scores, labels, targets.good)
        )


def scaled(scores_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """Scores from 0 on, by the range of the labels; both over the whole batch."""
    reach = labels_BL.max() - labels_BL.min()
    return (scores_BL - scores_BL.min()) / torch.where(reach > 0, reach, 1)


def unlike(scores_BL: Tensor, labels_BL: Tensor) -> Tensor:
    """1 - cos(labels, scores), the scores from 0 on; the sum over items."""
    labels_BL = labels_BL.float()
    found = F.normalize(scaled(scores_BL, labels_BL), dim=1)
    return (1 - F.cosine_similarity(F.normalize(labels_BL, dim=1), found, dim=1)).sum()


def hard_loss(scores_BL: Tensor, labels_BL: Tensor, good_BL: Tensor) -> Tensor:
    """The squared error of scores and labels of unit length, of clips that do not answer and of those that do.

    Args:
        scores_BL, labels_BL: of each clip.
        good_BL: bool, which answer.
    """
    error_BL = (F.normalize(scaled(scores_BL, labels_BL), dim=1) - F.normalize(labels_BL, dim=1)).square()
    return (error_BL * ~good_BL).mean() + (error_BL * good_BL).mean()


def rank_loss(scores_BL: Tensor, labels_BL: Tensor, there_BL: Tensor, temperature: float = 0.5) -> Tensor:
    """-log softmax of the clips with a label of r or more, for r = 1 .. 11; the sum over r of means over items, by 12.

    Args:
        scores_BL, labels_BL: of clips, whichever texts they are for.
        there_BL: 1, or 0 of padding.
        temperature: of the softmax.
    """
    log_share_BL = (scores_BL / temperature).log_softmax(1) * there_BL
    least_R = torch.arange(1, 12, device=scores_BL.device)
    above_RBL = (labels_BL >= least_R[:, None, None]).float()
    loss_RB = -(log_share_BL * above_RBL).sum(2) / above_RBL.sum(2).clamp(min=1)
    return loss_RB.mean(1).sum() / 12


def _mean_word(words_BWD: Tensor, words_BW: Tensor | None) -> Tensor:
    if words_BW is None:
        return words_BWD.mean(1, keepdim=True)
    there = words_BW[..., None].to(words_BWD.dtype)
    return (words_BWD * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1)
