"""OSCAR+: BERT over a text, its tags or answer, and the regions of an image.

Shape letters: B batch, L words, R regions, N = L + R, C channels, V vocabulary, K kinds of pollution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saccade.layers.bert import Bert
from saccade.models.masked_text import MaskedTextOutput


class OscarPlus(nn.Module):
    """Words (B, L) and region vectors (B, R, F) -> scores of the words, and whether they belong together.

    Args:
        vocabulary: V.
        dim, depth, num_heads, hidden, positions, drop, norm_eps: of `Bert`; large is 1024, 24, 16.
        region_dim: F.
        region_norm: regions are normalised after their map; released models of the first hour have it not.
        region_eps: of that norm.
        kinds: K: matched, wrong tags or answer, wrong caption or question.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(
        self,
        vocabulary: int = 30522,
        *,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        hidden: int | None = None,
        positions: int = 512,
        drop: float = 0.1,
        norm_eps: float = 1e-12,
        region_dim: int = 2054,
        region_norm: bool = True,
        region_eps: float = 1e-12,
        kinds: int = 3,
    ) -> None:
        super().__init__()
        if region_dim < 1 or kinds < 2:
            raise ValueError(f"region_dim must be positive and kinds at least 2, got {region_dim} and {kinds}")
        self.region_dim = region_dim
        self.bert = Bert(
            vocabulary, dim=dim, depth=depth, num_heads=num_heads, hidden=hidden, positions=positions, drop=drop,
            norm_eps=norm_eps,
        )  # fmt: skip
        self.regions = nn.Linear(region_dim, dim)
        self.region_norm = nn.LayerNorm(dim, region_eps) if region_norm else nn.Identity()
        self.drop = nn.Dropout(drop)
        self.pooler = nn.Linear(dim, dim)
        self.transform = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim, norm_eps))
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.kind = nn.Linear(dim, kinds)
        for linear in (self.regions, self.pooler, self.kind):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(
        self,
        input_ids: Tensor,
        region_vectors: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> MaskedTextOutput:
        """
        Args:
            input_ids: [CLS] caption [SEP] tags [SEP], or question and answer, (B, L).
            region_vectors: (B, R, F); None, or R = 0, is BERT.
            attention_mask: real words and regions (B, L + R), 1 or True; or which position sees which (B, N, N), see
                `captioning_mask`. All where None.
            token_type_ids: 0 for the first part of the text, 1 for the second, (B, L); 0 where None.

        Raises:
            ValueError: if shapes do not fit.
        """
        x_BNC = self.bert.embeddings(input_ids, token_type_ids)
        if region_vectors is not None:
            if len(region_vectors) != len(input_ids):
                raise ValueError(f"region_vectors must be of {len(input_ids)} images, got {len(region_vectors)}")
            x_BNC = torch.cat([x_BNC, self.embed_regions(region_vectors)], 1)
        states_BNC = self.bert.encode(x_BNC, mask=_mask(attention_mask, len(x_BNC), x_BNC.shape[1]))
        pooled_BC = self.pooler(states_BNC[:, 0]).tanh()
        return MaskedTextOutput(self.words(states_BNC), self.kind(pooled_BC), states_BNC, pooled_BC)

    def embed_regions(self, region_vectors: Tensor) -> Tensor:
        """Region vectors (B, R, F) as the first block takes them.

        Raises:
            ValueError: if they are none.
        """
        if region_vectors.ndim != 3 or region_vectors.shape[2] != self.region_dim:
            raise ValueError(
                f"region_vectors must be (batch, regions, {self.region_dim}), got {tuple(region_vectors.shape)}"
            )
        return self.drop(self.region_norm(self.regions(region_vectors)))

    def words(self, states: Tensor) -> Tensor:
        """Scores (..., V) of the word at each place, by the words' own vectors."""
        return self.transform(states) @ self.bert.embeddings.words.weight.T + self.bias


def captioning_mask(words: Tensor, others: Tensor) -> Tensor:
    """Which position sees which in captioning, (B, N, N) bool: words of the caption see those before them and all
    else; tags and regions see tags and regions.

    Args:
        words: real words of the caption, bool (B, L).
        others: real tags and regions, bool (B, M); N = L + M.
    """
    (B, L), M = words.shape, others.shape[1]
    past_LL = torch.ones(L, L, dtype=torch.bool, device=words.device).tril()
    of_words = torch.cat([words[:, None] & past_LL, others[:, None].expand(-1, L, -1)], 2)
    of_others = torch.cat([words.new_zeros(B, M, L), others[:, None].expand(-1, M, -1)], 2)
    return torch.cat([of_words, of_others], 1)


class Answers(nn.Module):
    """Of the pooled state of each of `views` images: logits of answers (VQA: one image, one linear map; NLVR2: two
    images, an inner layer).

    Args:
        dim: C.
        answers: how many.
        views: images that are asked of together.
        hidden: of an inner layer; None has none.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, dim: int, answers: int, views: int = 1, hidden: int | None = None) -> None:
        super().__init__()
        if min(dim, answers, views) < 1:
            raise ValueError(f"dim, answers and views must be positive, got {dim}, {answers} and {views}")
        self.views = views
        inner = [nn.Linear(views * dim, hidden), nn.ReLU()] if hidden else []
        self.layers = nn.Sequential(*inner, nn.Linear(hidden or views * dim, answers))

    def forward(self, pooled_BC: Tensor) -> Tensor:
        """
        Args:
            pooled_BC: of B / views questions, the images of one after the other.

        Raises:
            ValueError: if the images do not come out even.
        """
        if len(pooled_BC) % self.views:
            raise ValueError(f"pooled must be {self.views} images a question, got {len(pooled_BC)} rows")
        return self.layers(pooled_BC.unflatten(0, (-1, self.views)).flatten(1))


def _mask(given: Tensor | None, batch: int, count: int) -> Tensor | None:
    if given is None:
        return None
    if given.shape not in ((batch, count), (batch, count, count)):
        raise ValueError(f"attention_mask must be ({batch}, {count}) or of pairs, got {tuple(given.shape)}")
    return given.bool() if given.ndim == 2 else given.bool()[:, None]
