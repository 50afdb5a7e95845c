"""Networks that say how well two documents go together: their output, and losses by which they learn to rank.

Shape letters: B pairs of documents, m features, N scores of G groups, n negatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from saccade.ops.export import output


@output
@dataclass
class RankingOutput:
    """
    Attributes:
        score: (B,), the larger, the better the two go together.
        features: (B, m), what the score is made of.
        penalty: a scalar, what training adds to its loss; None where it adds nothing.
    """

    score: Tensor
    features: Tensor | None = None
    penalty: Tensor | None = None


def rank_hinge(
    score_N: Tensor, label_N: Tensor, negatives: int, *, margin: Literal["adaptive", "fixed"] | float = "adaptive"
) -> Tensor:
    """sum over the negatives of a group of max(0, m - (s+ - s-)), its mean over groups.

    Args:
        score_N: of groups that follow each other, each a positive and its negatives.
        label_N: of each; how good it is.
        negatives: n, of a group.
        margin: m: "adaptive" is the difference of the labels, "fixed" is 1.

    Raises:
        ValueError: if the shapes differ, are no whole groups, or the margin is an unknown word.
    """
    if negatives < 1 or score_N.ndim != 1 or score_N.shape != label_N.shape or len(score_N) % (negatives + 1):
        raise ValueError(
            f"scores and labels must be groups of {negatives + 1} (one positive and at least one negative), got "
            f"{tuple(score_N.shape)} and {tuple(label_N.shape)}"
        )
    if isinstance(margin, str) and margin not in ("adaptive", "fixed"):
        raise ValueError(f"margin must be adaptive, fixed or a number, got {margin!r}")
    score_Gn, label_Gn = (x.float().unflatten(0, (-1, negatives + 1)) for x in (score_N, label_N))
    apart_Gn = score_Gn[:, :1] - score_Gn[:, 1:]
    wanted: Tensor | float
    if margin == "adaptive":
        wanted = label_Gn[:, :1] - label_Gn[:, 1:]
    else:
        wanted = 1.0 if isinstance(margin, str) else margin
    return (wanted - apart_Gn).relu().sum(1).mean()
