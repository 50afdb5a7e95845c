"""The limits of attention as it is in a model: head by head, row by row.

Shape letters: B batch, H heads, R rows (queries), L tokens, D width of a token, N top tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.explain.normalization_limits.theory import (
    cumulative_distance,
    distance_bound,
    expected_distance,
    separable,
    top,
)
from saccade.extras import need, new_figure
from saccade.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from saccade.explain.recording import AttentionRecord


@dataclass
class Limits:
    """Of each row of weights, (B, H, R). Of rows with at most N tokens all are top ones: nothing lies apart.

    Attributes:
        count: N.
        distance: d of the top N.
        bound: its bound.
        expected: the main sum, d's mean over all sets of N tokens from below.
        separable: N_s / N.
        mass: A, the weight of the top N.
        largest: the largest weight.
        lengths: how many tokens a row sees, (B, H, R).
    """

    count: int
    distance: Tensor
    bound: Tensor
    expected: Tensor
    separable: Tensor
    mass: Tensor
    largest: Tensor
    lengths: Tensor

    def of_heads(self) -> dict[str, Tensor]:
        """Means over batch and the rows with more than N tokens, (H,)."""
        names = ("distance", "bound", "expected", "separable", "mass", "largest")
        counts = self.lengths > self.count
        number = counts.sum((0, 2)).clamp(min=1)
        return {name: (getattr(self, name) * counts).sum((0, 2)) / number for name in names}

    def table(self) -> str:
        """A line a head."""
        means = self.of_heads()
        rows = [(str(h), *(f"{float(each[h]):.3f}" for each in means.values())) for h in range(self.distance.shape[1])]
        return table(("head", *means), rows)

    def plot(self) -> Figure:
        """Distance, its expectation and its bound, and what can be told apart, by the tokens that a row sees.

        Raises:
            ImportError: if matplotlib is not installed.
        """
        figure = new_figure(9, 3.4)
        left, right = figure.subplots(1, 2)
        lengths = self.lengths[:, 0].flatten()
        order = lengths.argsort()
        for name in ("distance", "expected", "bound"):
            left.plot(lengths[order], getattr(self, name).mean(1).flatten()[order], label=name)
        left.set(xlabel="tokens", ylabel=f"cumulative distance, N = {self.count}")
        left.legend()
        right.plot(lengths[order], self.separable.mean(1).flatten()[order], ".")
        right.set(xlabel="tokens", ylabel="share of the top tokens that can be told apart", ylim=(0, 1.05))
        return figure


class NormalizationLimits(nn.Module):
    """Limits of weights (B, H, R, L) over tokens (B, L, D).

    Args:
        count: N.
        normalised: tokens are brought to length 1, as the theory of separability has them.
        sinks: the first tokens that do not count, as one that draws most of the weight would hide the rest.

    Raises:
        ValueError: if a number is out of range.
    """

    def __init__(self, count: int = 5, *, normalised: bool = True, sinks: int = 0) -> None:
        super().__init__()
        if count < 1 or sinks < 0:
            raise ValueError(f"count must be positive and sinks not negative, got {count} and {sinks}")
        self.count, self.normalised, self.sinks = count, normalised, sinks

    def forward(self, weights_BHRL: Tensor, x_BLD: Tensor) -> Limits:
        """
        Args:
            weights_BHRL: alpha; a token of weight 0 is one that the row does not see.
            x_BLD: tokens, or their values.

        Raises:
            ValueError: if the shapes do not fit.
        """
        if weights_BHRL.ndim != 4 or x_BLD.ndim != 3 or weights_BHRL.shape[::3] != x_BLD.shape[:2]:
            raise ValueError(
                "weights must be (batch, heads, rows, tokens) and tokens (batch, tokens, width), got "
                f"{tuple(weights_BHRL.shape)} and {tuple(x_BLD.shape)}"
            )
        wide = torch.promote_types(weights_BHRL.dtype, torch.float32)
        alpha, x = weights_BHRL[..., self.sinks :].to(wide), x_BLD[:, None, None, self.sinks :].to(wide)
        if self.sinks:
            alpha = alpha / alpha.sum(-1, keepdim=True).clamp(min=torch.finfo(wide).tiny)
        x = F.normalize(x, dim=-1) if self.normalised else x
        chosen = top(alpha, min(self.count, alpha.shape[-1]))
        found = {
            "distance": cumulative_distance(alpha, x, chosen),
            "bound": distance_bound(alpha, x, chosen),
            "expected": expected_distance(alpha, x, self.count)[0],
            "separable": separable(alpha, x, chosen)[0],
            "mass": alpha.gather(-1, chosen).sum(-1),
            "largest": alpha.amax(-1),
        }
        said = {name: each.to(weights_BHRL.dtype) for name, each in found.items()}
        return Limits(self.count, **said, lengths=(alpha > 0).sum(-1))


def of_record(
    record: AttentionRecord, x_BLD: Tensor, *, count: int = 5, rows: Sequence[int] | None = None, sinks: int = 0
) -> Limits:
    """Limits of a layer as `saccade.explain.recording.recorded` keeps it.

    Args:
        record: of one layer.
        x_BLD: the tokens, such as their embeddings.
        count: N.
        rows: queries; all where None.
        sinks: first tokens that do not count.
    """
    return NormalizationLimits(count, sinks=sinks)(record.weights(rows=rows), x_BLD)


def critical_count(
    distance_RN: Tensor, expected_RN: Tensor, counts: Sequence[int], *, level: float = 0.01
) -> int | None:
    """The smallest N at which the distance of the top N is no longer told from that of random sets; None if none is.

    By a Kolmogorov-Smirnov test of the means of heads, at that level.

    Args:
        distance_RN: d of each head (R) at each count.
        expected_RN: its expectation.
        counts: N, rising.
        level: of the test.

    Raises:
        ImportError: if scipy is not installed.
    """
    stats = need("scipy.stats", "the critical count")
    for number, count in enumerate(counts):
        pair = (each[:, number].double().numpy() for each in (distance_RN, expected_RN))
        if stats.ks_2samp(*pair).pvalue > level:
            return count
    return None
