"""Whether a model's scanpaths are as alike, and as various, as people's.

Any measure of two scanpaths gives a table of figures, of people and model, of people among themselves, of the model's
among themselves. These are read here.

Shape letters: R human scanpaths, G generated ones, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: edges of histograms, and what is added to the model's
EDGES, FLOOR = 100, 1e-10


def pairwise(
    measure: Callable[[Tensor, Tensor], float], a: Sequence[Tensor], b: Sequence[Tensor] | None = None
) -> Tensor:
    """A measure of every pair: (len(a), len(b)), or of one set all pairs of two, (P,), in the order 01, 02, ..., 12.

    Args:
        measure: of two scanpaths.
        a, b: scanpaths; b None takes pairs of a.
    """
    if b is None:
        return torch.tensor(
            [measure(a[i], a[j]) for i in range(len(a)) for j in range(i + 1, len(a))], dtype=torch.double
        )
    return torch.tensor([[measure(first, second) for second in b] for first in a], dtype=torch.double)


def recalled(score_GR: Tensor, threshold: float) -> float:
    """The share of human scanpaths that some generated one matches with more than a threshold.

    Args:
        score_GR: of each generated and each human scanpath.
        threshold: of the measure.
    """
    return float((score_GR > threshold).any(0).double().mean())


def diversity_score(score_GR: Tensor, human_P: Tensor, model_P: Tensor) -> float:
    """The mean score, divided by 1 and how much the model differs from people in how alike its scanpaths are.

    Args:
        score_GR: of each generated and each human scanpath.
        human_P: of pairs of human ones.
        model_P: of pairs of generated ones.
    """
    apart = (model_P.double().mean() - human_P.double().mean()).abs()
    return float(score_GR.double().mean() / (1 + apart))


def histogram_divergence(human: Tensor, model: Tensor, edges: int = EDGES) -> float:
    """KL of the histogram of figures among people from that of model and people; 0 where they vary alike.

    Both share edges from the smallest to the largest figure of either; FLOOR is added to the model's shares.

    Args:
        human, model: figures, of any shape.
        edges: how many.

    Raises:
        ValueError: if there are no figures.
    """
    if not human.numel() or not model.numel():
        raise ValueError(f"there must be figures of both, got {human.numel()} and {model.numel()}")
    human, model = human.double().flatten(), model.double().flatten()
    least, most = float(min(human.min(), model.min())), float(max(human.max(), model.max()))
    p, q = (torch.histc(values, edges - 1, least, most) / len(values) for values in (human, model))
    q = q + FLOOR
    return float(torch.where(p > 0, p * (p.clamp(min=1e-300) / q).log(), 0.0).sum())
