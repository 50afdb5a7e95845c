"""Conv-KNRM, the matching baseline of the task: one linear map of the kernel features of all windows.

Shape letters: B pairs, L words, n, m those of product and review, C width of a word, h channels; m also features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from saccade.models.premise.fields import NGrams
from saccade.models.premise.matching import kernel_centres, kernel_features, unit
from saccade.models.ranking import RankingOutput


class ConvKNRM(nn.Module):
    """Windows of a product's text against those of a review's, with two sets of weights.

    Args:
        vocabulary: words.
        word_dim: C.
        dim: h.
        windows: words after the first of each window.
        kernels, sigma, exact_sigma: of `kernel_centres`.
        crossmatch: windows of different lengths are matched too.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        word_dim: int = 300,
        dim: int = 128,
        windows: Sequence[int] = (1, 3, 5),
        kernels: int = 8,
        sigma: float = 1.0,
        exact_sigma: float = 1.0,
        crossmatch: bool = True,
    ) -> None:
        super().__init__()
        self.product_words, self.review_words = (nn.Embedding(vocabulary, word_dim) for _ in range(2))
        self.product, self.review = (nn.ModuleList(NGrams(word_dim, dim, more) for more in windows) for _ in range(2))
        count = range(len(windows))
        self.pairs = [(i, j) for i in count for j in count if crossmatch or i == j]
        centre, width = kernel_centres(kernels, sigma, exact_sigma)
        self.register_buffer("centre", centre, persistent=False)
        self.register_buffer("width", width, persistent=False)
        self.out = nn.Linear(kernels * len(self.pairs), 1)

    def forward(
        self,
        product_text: Tensor,
        review_text: Tensor,
        product_text_mask: Tensor | None = None,
        review_text_mask: Tensor | None = None,
    ) -> RankingOutput:
        """
        Args:
            product_text, review_text: words (B, L).
            product_text_mask, review_text_mask: bool, True = real word; all are where None, as in the authors' code.
        """
        sides = []
        for ids_BL, mask_BL, words, windows in (
            (product_text, product_text_mask, self.product_words, self.product),
            (review_text, review_text_mask, self.review_words, self.review),
        ):
            mask_BL = torch.ones_like(ids_BL, dtype=torch.bool) if mask_BL is None else mask_BL
            x_BLC = torch.where(mask_BL[..., None], words(ids_BL), 0)
            sides.append(([unit(window(x_BLC)) for window in windows], mask_BL))
        (product, real_Bn), (review, real_Bm) = sides
        assert isinstance(self.centre, Tensor) and isinstance(self.width, Tensor)
        there_Bnm = real_Bn[..., None] & real_Bm[:, None]
        features_Bm = torch.cat(
            [kernel_features(product[i] @ review[j].mT, there_Bnm, self.centre, self.width) for i, j in self.pairs], 1
        )
        return RankingOutput(self.out(features_Bm)[:, 0], features_Bm)
