"""PREMISE: the score of a product and a review, made of nothing but how like their fields are.

Shape letters: B pairs, L words, R regions, C width of a word's vector or a region's feature, h common width (D), n, m
rows, O others that rows are kept for, K kept rows; m also features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from saccade.models.premise.fields import ImageScales, Rows, TextScales
from saccade.models.premise.matching import kernel_centres, kernel_features, top_features
from saccade.models.premise.selection import Slots, greedy, likeness_penalty, relevance
from saccade.models.ranking import RankingOutput

FILTERS, FEATURES = ("greedy", "slots", "none"), ("topk", "kernel", "flat")
#: of the four fields by number (product text, product image, review text, review image) those that are matched
PAIRS = ((0, 2), (1, 3), (0, 3), (1, 2), (2, 3), (0, 1))
_NAMES = ("product_text", "product_regions", "review_text", "review_regions")


@dataclass
class _Field:
    """What is given of a field: rows (B, n, C), which there are, and each one's group."""

    x: Tensor
    mask: Tensor
    group: Tensor | None


class MatchingScores(nn.Module):
    """Sets of unit rows -> the scores of each pair of sets, copies removed.

    Args:
        dim: h.
        sets: how many sets of rows there are.
        pairs: of their numbers, those that are matched.
        filter: "greedy", "slots", or "none", which keeps all rows.
        features: "topk", "kernel", or "flat" (all cosines of slots).
        keep, threshold: K, and the cosine from which a row is a copy.
        top_k: largest scores that are kept.
        kernels, sigma, exact_sigma: of "kernel".

    Raises:
        ValueError: if a word is unknown, a number is not in its range, or cosines of no slots are to be laid flat.
    """

    def __init__(
        self,
        dim: int,
        sets: int,
        pairs: Sequence[tuple[int, int]],
        *,
        filter: Literal["greedy", "slots", "none"] = "greedy",
        features: Literal["topk", "kernel", "flat"] = "topk",
        keep: int = 8,
        threshold: float = 0.9,
        top_k: int = 8,
        kernels: int = 8,
        sigma: float = 1.0,
        exact_sigma: float = 1.0,
    ) -> None:
        super().__init__()
        for name, word, known in (("filter", filter, FILTERS), ("features", features, FEATURES)):
            if word not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {word!r}")
        if features == "flat" and filter != "slots":
            raise ValueError(f"flat features have an order with slots only, got filter {filter!r}")
        if min(keep, top_k) < 1 or not 0 < threshold <= 1:
            raise ValueError(
                f"keep and top_k must be positive and threshold in (0, 1], got {keep}, {top_k} and {threshold}"
            )
        self.pairs, self.filter, self.features = tuple(pairs), filter, features
        self.keep, self.threshold, self.top_k = keep, threshold, top_k
        self.slots = nn.ModuleList(Slots(dim, keep) for _ in range(sets)) if filter == "slots" else None
        centre, width = kernel_centres(kernels, sigma, exact_sigma)
        self.register_buffer("centre", centre, persistent=False)
        self.register_buffer("width", width, persistent=False)
        each = {"topk": top_k + 2, "kernel": kernels, "flat": keep**2}[features]
        self.dim = each * len(self.pairs)

    def forward(self, sets: Sequence[Rows]) -> tuple[Tensor, Tensor | None]:
        """The scores (B, dim), and with slots their penalty.

        Args:
            sets: unit rows (B, n, h) and which there are, bool (B, n), of each.
        """
        kept, penalty = self.kept(sets)
        found = []
        for a, b in self.pairs:
            (x_BnD, x_Bn), (y_BmD, y_Bm) = kept[a, b], kept[b, a]
            score_Bnm = _wide(x_BnD) @ _wide(y_BmD).mT
            found.append(self.scores(score_Bnm, x_Bn[..., None] & y_Bm[:, None]))
        return torch.cat(found, 1), penalty

    def scores(self, score_Bnm: Tensor, there_Bnm: Tensor) -> Tensor:
        """The features of one pair's cosines."""
        if self.features == "topk":
            return top_features(score_Bnm, there_Bnm, self.top_k)
        if self.features == "kernel":
            assert isinstance(self.centre, Tensor) and isinstance(self.width, Tensor)
            return kernel_features(score_Bnm, there_Bnm, self.centre, self.width)
        return (score_Bnm * there_Bnm).flatten(1)

    def kept(self, sets: Sequence[Rows]) -> tuple[dict[tuple[int, int], Rows], Tensor | None]:
        """The rows that stay, of each set for each other set with which it is matched."""
        partners = {
            number: [b if a == number else a for a, b in self.pairs if number in (a, b)] for number in range(len(sets))
        }
        found: dict[tuple[int, int], Rows] = {}
        penalties = []
        for number, (x_BnD, mask_Bn) in enumerate(sets):
            others = partners[number]
            if not others:
                continue
            if self.filter == "none":
                found |= {(number, other): (x_BnD, mask_Bn) for other in others}
            elif self.slots is not None:
                rows = self.slots[number](x_BnD, mask_Bn)
                penalties.append(likeness_penalty(*rows))
                found |= {(number, other): rows for other in others}
            else:
                with torch.no_grad():
                    rows_BnD = _wide(x_BnD)
                    about = [relevance(rows_BnD, _wide(sets[other][0]), sets[other][1]) for other in others]
                    place_BOK, there_BOK = greedy(rows_BnD, mask_Bn, torch.stack(about, 1), self.keep, self.threshold)
                for o, other in enumerate(others):
                    index_BKD = place_BOK[:, o, :, None].expand(-1, -1, x_BnD.shape[2])
                    found[number, other] = x_BnD.gather(1, index_BKD), there_BOK[:, o]
        return found, torch.stack(penalties).mean() if penalties else None


class PREMISE(nn.Module):
    """How helpful a review is for a product.

    Args:
        vocabulary: words, which then are numbers; None takes vectors of words as they are.
        word_dim: C of words.
        region_dim: C of regions; None has no image fields.
        dim: h.
        windows: words after the first of each window.
        sentences, images: most groups of a field.
        shared: one set of encoders for product and review, or two.
        filter, features, keep, threshold, top_k, kernels, sigma, exact_sigma: of `MatchingScores`.
        hidden: of the predictor.
        image_depth, image_heads: of the transformer over regions.
        word_drop, region_drop, image_drop, drop: dropout of words, of regions, in their transformer, of the predictor.
        penalty: weight of the slots' likeness.

    Raises:
        ValueError: if a size is not positive, or as `MatchingScores` does.
    """

    def __init__(
        self,
        *,
        vocabulary: int | None = None,
        word_dim: int = 300,
        region_dim: int | None = 2048,
        dim: int = 128,
        windows: Sequence[int] = (1, 3, 5),
        sentences: int = 16,
        images: int = 16,
        shared: bool = True,
        filter: Literal["greedy", "slots", "none"] = "greedy",
        features: Literal["topk", "kernel", "flat"] = "topk",
        keep: int = 8,
        threshold: float = 0.9,
        top_k: int = 8,
        kernels: int = 8,
        sigma: float = 1.0,
        exact_sigma: float = 1.0,
        hidden: int = 128,
        image_depth: int = 3,
        image_heads: int = 4,
        word_drop: float = 0.2,
        region_drop: float = 0.5,
        image_drop: float = 0.3,
        drop: float = 0.2,
        penalty: float = 0.1,
    ) -> None:
        super().__init__()
        if min(word_dim, dim, sentences, images, hidden) < 1 or (vocabulary is not None and vocabulary < 1):
            raise ValueError(
                "vocabulary, word_dim, dim, sentences, images and hidden must be positive, got "
                f"{vocabulary}, {word_dim}, {dim}, {sentences}, {images} and {hidden}"
            )
        self.word_dim, self.region_dim, self.penalty = word_dim, region_dim, penalty
        self.words = None if vocabulary is None else nn.Embedding(vocabulary, word_dim)
        sides = 1 if shared else 2
        self.text = nn.ModuleList(TextScales(word_dim, dim, windows, sentences, word_drop) for _ in range(sides))
        self.image = None
        if region_dim is not None:
            self.image = nn.ModuleList(
                ImageScales(region_dim, dim, images, image_depth, image_heads, image_drop, region_drop)
                for _ in range(sides)
            )
        scales = [len(windows) + 2, 3 if region_dim is not None else 0] * 2
        first = [sum(scales[:field]) for field in range(4)]
        pairs = [(first[a] + i, first[b] + j) for a, b in PAIRS for i in range(scales[a]) for j in range(scales[b])]
        self.matching = MatchingScores(
            dim, sum(scales), pairs, filter=filter, features=features, keep=keep, threshold=threshold, top_k=top_k,
            kernels=kernels, sigma=sigma, exact_sigma=exact_sigma,
        )  # fmt: skip
        width = self.matching.dim + (2 if region_dim is None else 4)
        self.predictor = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(drop), nn.Linear(hidden, 1)
        )

    def forward(
        self,
        product_text: Tensor,
        review_text: Tensor,
        product_regions: Tensor | None = None,
        review_regions: Tensor | None = None,
        product_text_mask: Tensor | None = None,
        review_text_mask: Tensor | None = None,
        product_regions_mask: Tensor | None = None,
        review_regions_mask: Tensor | None = None,
        product_sentences: Tensor | None = None,
        review_sentences: Tensor | None = None,
        product_images: Tensor | None = None,
        review_images: Tensor | None = None,
    ) -> RankingOutput:
        """
        Args:
            product_text, review_text: words (B, L), or their vectors (B, L, C) where there is no vocabulary.
            product_regions, review_regions: features (B, R, C) of regions; None has no images.
            product_text_mask, review_text_mask, product_regions_mask, review_regions_mask: of these, not 0 = there.
            product_sentences, review_sentences: (B, L), the number of each word's sentence.
            product_images, review_images: (B, R), the number of each region's image.

        Raises:
            ValueError: if a field has another shape, or there are images and the network takes none.
        """
        given = (product_text, product_regions, review_text, review_regions)
        masks = (product_text_mask, product_regions_mask, review_text_mask, review_regions_mask)
        groups = (product_sentences, product_images, review_sentences, review_images)
        sets: list[Rows] = []
        there = []
        for number, (x, mask, group) in enumerate(zip(given, masks, groups)):
            if number % 2 and self.image is None:
                if x is not None:
                    raise ValueError(
                        f"{_NAMES[number]} is given, and this network has no images: build it with region_dim"
                    )
                continue
            field = self.field(number, x, mask, group, len(product_text))
            encoder = self.image if number % 2 else self.text
            assert encoder is not None
            sets += encoder[number // 2 % len(encoder)](field.x, field.mask, field.group)
            there.append(field.mask.any(1))
        features_Bm, penalty = self.matching(sets)
        dtype = next(self.predictor.parameters()).dtype
        features_Bm = torch.cat([features_Bm, torch.stack(there, 1)], 1).to(dtype)
        score_B = self.predictor(features_Bm)[:, 0]
        return RankingOutput(score_B, features_Bm, None if penalty is None else self.penalty * penalty)

    def field(self, number: int, x: Tensor | None, mask: Tensor | None, group: Tensor | None, batch: int) -> _Field:
        """A field with all that goes with it; one that is not there has a row that is not."""
        name, of_image = _NAMES[number], number % 2
        width = self.region_dim if of_image else self.word_dim
        assert width is not None
        if x is None:
            zeros = next(self.parameters()).new_zeros(batch, 1, width)
            return _Field(zeros, zeros.new_zeros(batch, 1, dtype=torch.bool), None)
        if not of_image and self.words is not None:
            if x.ndim != 2 or x.is_floating_point():
                raise ValueError(f"{name} must be words (batch, words), got {tuple(x.shape)} {x.dtype}")
            x = self.words(x)
        if x.ndim != 3 or x.shape[0] != batch or not x.shape[1] or x.shape[2] != width:
            raise ValueError(f"{name} must be ({batch}, rows, {width}), got {tuple(x.shape)}")
        for what, each in (("mask", mask), ("groups", group)):
            if each is not None and each.shape != x.shape[:2]:
                raise ValueError(f"the {what} of {name} must be {tuple(x.shape[:2])}, got {tuple(each.shape)}")
        mask = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask != 0
        return _Field(x, mask, group)


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x if x.dtype == torch.float64 else x.float()
