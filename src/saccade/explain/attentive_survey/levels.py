"""The other axes as modules: pooling, several levels, several sequences, several representations.

Shape letters: B batch, S sentences, N words or regions, T words of a question, C channels, R representations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saccade.explain.attentive_survey.alignments import alignment
from saccade.ops.distributions import distribute


class AttentionPooling(nn.Module):
    """Tokens to one vector, by their alignment with a query: sum_i p(a(h_i, u)) h_i, u learned or given.

    Args:
        dim: C.
        alignment, hidden: which, and its width, as of `GeneralAttention`.
        distribution: p.
    """

    def __init__(
        self,
        dim: int,
        *,
        alignment: str = "additive",
        hidden: int | None = None,
        distribution: str | float = "softmax",
    ) -> None:
        super().__init__()
        self.align, self.distribution = _aligned(alignment, dim, hidden), distribution
        self.query = nn.Parameter(torch.empty(dim).uniform_(-(dim**-0.5), dim**-0.5))

    def forward(
        self,
        x_BNC: Tensor,
        *,
        mask_BN: Tensor | None = None,
        query_BC: Tensor | None = None,
        weights_BN: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            x_BNC: tokens.
            mask_BN: True for real tokens.
            query_BC: u, in place of the learned one.
            weights_BN: taken in place of the own weights, as probes do.

        Returns:
            pooled (B, C) and weights (B, N).
        """
        if weights_BN is None:
            query = self.query.expand(len(x_BNC), -1) if query_BC is None else query_BC
            scores_BN = self.align(query[:, None], x_BNC, mask_BN)[:, 0]
            weights_BN = distribute(scores_BN, self.distribution, allowed=mask_BN)
        return (weights_BN[:, None] @ x_BNC)[:, 0], weights_BN


@dataclass
class Hierarchical:
    """What two levels of attention made of a document.

    Attributes:
        document: (B, C).
        words: weights within each sentence, (B, S, N).
        sentences: weights of the sentences, (B, S).
    """

    document: Tensor
    words: Tensor
    sentences: Tensor


class HierarchicalAttention(nn.Module):
    """Words to sentences, sentences to a document, without a query at either level (Yang et al., 2016): bottom-up.

    Args:
        dim: C.
        between: what makes of the sentences' vectors (B, S, C) what the second level sees; nothing where None.
        alignment, hidden, distribution: as of `AttentionPooling`.
    """

    def __init__(
        self,
        dim: int,
        *,
        between: nn.Module | None = None,
        alignment: str = "additive",
        hidden: int | None = None,
        distribution: str | float = "softmax",
    ) -> None:
        super().__init__()
        self.words, self.sentences = (
            AttentionPooling(dim, alignment=alignment, hidden=hidden, distribution=distribution) for _ in range(2)
        )
        self.between = nn.Identity() if between is None else between

    def forward(self, x_BSNC: Tensor, *, mask_BSN: Tensor | None = None) -> Hierarchical:
        """
        Args:
            x_BSNC: words.
            mask_BSN: True for real words; a sentence without any is none.

        Raises:
            ValueError: if these are no sentences of words.
        """
        if x_BSNC.ndim != 4:
            raise ValueError(f"words must be (batch, sentences, words, channels), got {tuple(x_BSNC.shape)}")
        B, S = x_BSNC.shape[:2]
        mask = None if mask_BSN is None else mask_BSN.flatten(0, 1)
        pooled, words = self.words(x_BSNC.flatten(0, 1), mask_BN=mask)
        pooled_BSC = self.between(pooled.unflatten(0, (B, S)))
        document, sentences = self.sentences(pooled_BSC, mask_BN=None if mask_BSN is None else mask_BSN.any(-1))
        return Hierarchical(document, words.unflatten(0, (B, S)), sentences)


@dataclass
class CoAttended:
    """What regions and words made of each other.

    Attributes:
        regions, words: their weights, (B, N) and (B, T).
        image, question: the vectors that these make, (B, C).
    """

    regions: Tensor
    words: Tensor
    image: Tensor
    question: Tensor


class CoAttention(nn.Module):
    """Two sequences that guide each other, at once (the parallel form of Lu et al., 2016).

        C = tanh(Q^T W_b V),    H_v = tanh(W_v V + (W_q Q) C),    H_q = tanh(W_q Q + (W_v V) C^T)
        a_v = softmax(w_v . H_v),    a_q = softmax(w_q . H_q)

    Args:
        dim: C.
        hidden: width of H.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        self.both = nn.Linear(dim, dim, bias=False)
        self.of_regions, self.of_words = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.score_regions, self.score_words = (nn.Linear(hidden, 1, bias=False) for _ in range(2))

    def forward(
        self,
        v_BNC: Tensor,
        q_BTC: Tensor,
        *,
        mask_BN: Tensor | None = None,
        mask_BT: Tensor | None = None,
    ) -> CoAttended:
        """
        Args:
            v_BNC: regions of an image.
            q_BTC: words of a question.
            mask_BN, mask_BT: True for real ones.
        """
        affinity_BTN = (q_BTC @ self.both(v_BNC).mT).tanh()
        for mask in (None if mask_BN is None else mask_BN[:, None], None if mask_BT is None else mask_BT[..., None]):
            affinity_BTN = affinity_BTN if mask is None else affinity_BTN * mask
        v, q = self.of_regions(v_BNC), self.of_words(q_BTC)
        h_v, h_q = (v + affinity_BTN.mT @ q).tanh(), (q + affinity_BTN @ v).tanh()
        regions = distribute(self.score_regions(h_v)[..., 0], "softmax", allowed=mask_BN)
        words = distribute(self.score_words(h_q)[..., 0], "softmax", allowed=mask_BT)
        return CoAttended(regions, words, (regions[:, None] @ v_BNC)[:, 0], (words[:, None] @ q_BTC)[:, 0])


class MetaEmbedding(nn.Module):
    """Representations of each token to one: sum_i a_i (W_i x_i + b_i), a from what they are (Kiela et al., 2018).

    Args:
        dims: widths of the representations.
        dim: C.
        alignment, hidden: of the score, which has no query but a learned one.
    """

    def __init__(
        self, dims: Sequence[int], dim: int, *, alignment: str = "additive", hidden: int | None = None
    ) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(width, dim) for width in dims)
        self.pool = AttentionPooling(dim, alignment=alignment, hidden=hidden)

    def forward(self, *views: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            views: of all tokens, (B, N, width) each.

        Returns:
            tokens (B, N, C) and the weights of their representations (B, N, R).

        Raises:
            ValueError: if there are not as many views as representations.
        """
        if len(views) != len(self.projections):
            raise ValueError(f"there must be {len(self.projections)} representations, got {len(views)}")
        x_BNRC = torch.stack([proj(view) for proj, view in zip(self.projections, views, strict=True)], 2)
        pooled, weights = self.pool(x_BNRC.flatten(0, 1))
        return pooled.unflatten(0, x_BNRC.shape[:2]), weights.unflatten(0, x_BNRC.shape[:2])


def _aligned(name: str, dim: int, hidden: int | None) -> nn.Module:
    return alignment(name, dim) if hidden is None else alignment(name, dim, hidden=hidden)
