"""Which brand an ad shows, by its words and its logos, without training.

Shape letters: N brands, T logo templates, R regions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Brand:
    """
    Attributes:
        name: of the brand; None where the evidence does not do.
        scores: of each candidate.
        terms: of each candidate, the terms of its score, not weighed: "name" (the nearest region to its name), "logo"
            (the nearest to one of its templates) and "text" (1 where it is read).
    """

    name: str | None
    scores: dict[str, float]
    terms: dict[str, dict[str, float]]


class BrandUnderstanding:
    """Candidates by words and by logos, scored together.

        score(b) = cos(region, "a brand logo of b") + lambda_v cos(region, logo of b) + lambda_t [b is read]

    Everything is given from outside: a dictionary of names, features of their prompts, and of logos.

    Args:
        names: N, of brands.
        name_features: (N, D), of "a brand logo of {name}" by the text encoder.
        templates: (T, D), of logos by the image encoder; None has none.
        template_brands: (T,), the number of each logo's brand.
        logo_weight, text_weight: lambda_v and lambda_t.
        threshold: of the mean of the terms that a candidate has; below it no brand is named.
        top: candidates by logos.
        longest: words of the longest name that is read.

    Raises:
        ValueError: if the features do not fit the names.
    """

    def __init__(
        self,
        names: Sequence[str],
        name_features: Tensor,
        templates: Tensor | None = None,
        template_brands: Tensor | None = None,
        *,
        logo_weight: float = 1.0,
        text_weight: float = 1.0,
        threshold: float = 0.3,
        top: int = 5,
        longest: int = 4,
    ) -> None:
        if name_features.ndim != 2 or len(name_features) != len(names):
            raise ValueError(f"name_features must be ({len(names)}, width), got {tuple(name_features.shape)}")
        if (templates is None) != (template_brands is None):
            raise ValueError("templates and template_brands must be given together")
        if templates is not None and template_brands is not None:
            if templates.ndim != 2 or templates.shape[1] != name_features.shape[1]:
                raise ValueError(f"templates must be (logos, {name_features.shape[1]}), got {tuple(templates.shape)}")
            if template_brands.shape != templates.shape[:1] or not _numbers(template_brands, len(names)):
                raise ValueError(f"template_brands must be a number below {len(names)} for each of {len(templates)}")
        if min(top, longest) < 1:
            raise ValueError(f"top and longest must be positive, got {top} and {longest}")
        self.names = list(names)
        self.of_name = {_folded(name): number for number, name in enumerate(self.names)}
        self.name_ND = F.normalize(name_features.float(), dim=-1)
        self.template_TD = self.name_ND[:0] if templates is None else F.normalize(templates.float(), dim=-1)
        self.brand_T = torch.zeros(0, dtype=torch.long) if template_brands is None else template_brands.long()
        self.logo_weight, self.text_weight, self.threshold = logo_weight, text_weight, threshold
        self.top, self.longest = top, longest

    def read(self, words: Sequence[str]) -> set[int]:
        """The brands whose names stand among recognised words, in any case; names may have several words."""
        found = set()
        for length in range(1, self.longest + 1):
            for start in range(len(words) - length + 1):
                number = self.of_name.get(_folded(" ".join(words[start : start + length])))
                if number is not None:
                    found.add(number)
        return found

    def __call__(self, words: Sequence[str] = (), image: Tensor | None = None, regions: Tensor | None = None) -> Brand:
        """The brand of one ad.

        Args:
            words: that are read in it, in their order.
            image: (D,), the feature of the image.
            regions: (R, D), features of places that may be logos.

        Raises:
            ValueError: if a feature has another width.
        """
        width = self.name_ND.shape[1]
        parts = [] if image is None else [image[None]]
        parts += [] if regions is None else [regions]
        if any(part.ndim != 2 or part.shape[1] != width for part in parts):
            raise ValueError(f"image must be ({width},) and regions (regions, {width})")
        seen_RD = F.normalize(torch.cat(parts).float(), dim=-1) if parts else self.name_ND[:0]
        crops_RD = seen_RD if image is None else seen_RD[1:]
        read = self.read(words)
        logo = self._logos(crops_RD)
        scores, terms = {}, {}
        for number in sorted(read | set(logo)):
            found = {"text": 1.0} if number in read else {}
            if len(seen_RD):
                found["name"] = float((seen_RD @ self.name_ND[number]).max())
            near = self._near(crops_RD, number)
            if near is not None:
                found["logo"] = near
            weights = {"name": 1.0, "logo": self.logo_weight, "text": self.text_weight}
            terms[self.names[number]] = found
            scores[self.names[number]] = sum(weights[term] * value for term, value in found.items())
        if not scores:
            return Brand(None, {}, {})
        best = max(scores, key=lambda name: scores[name])
        enough = sum(terms[best].values()) / len(terms[best]) >= self.threshold
        return Brand(best if enough else None, scores, terms)

    def _logos(self, crops_RD: Tensor) -> list[int]:
        """The brands of the templates that are nearest to any region."""
        if not len(crops_RD) or not len(self.template_TD):
            return []
        near_T = (crops_RD @ self.template_TD.T).amax(0)
        order = near_T.argsort(descending=True).tolist()
        return list(dict.fromkeys(int(self.brand_T[number]) for number in order))[: self.top]

    def _near(self, crops_RD: Tensor, number: int) -> float | None:
        own_TD = self.template_TD[self.brand_T == number]
        return float((crops_RD @ own_TD.T).max()) if len(crops_RD) and len(own_TD) else None


def _folded(name: str) -> str:
    return " ".join(name.casefold().split())


def _numbers(numbers: Tensor, count: int) -> bool:
    return not numbers.numel() or (int(numbers.min()) >= 0 and int(numbers.max()) < count)
