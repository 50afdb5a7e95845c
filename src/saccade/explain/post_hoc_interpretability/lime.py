"""LIME for texts (Ribeiro et al., arXiv 1602.04938), as the paper analyses it.

Shape letters: d distinct words, S samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def lime(
    score: Callable[[Tensor], Tensor],
    words: int,
    *,
    samples: int = 5000,
    bandwidth: float = 0.25,
    ridge: float = 1.0,
    batch: int = 256,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    """Coefficients (d,) of a weighted ridge regression of the score on which words are there, and its intercept.

        weight = sqrt(exp(-D^2 / (100 nu)^2)),    D = 100 (1 - sqrt(share of words that are there))

    The first sample is the whole document; each other one lacks a uniform number of words, from 1 to all of them.

    Args:
        score: f with some words alone: kept (S, d) -> (S,).
        words: d, distinct ones.
        samples: S.
        bandwidth: nu; infinity weighs all samples alike.
        ridge: penalty of the coefficients; the intercept has none.
        batch: samples in one call of `score`.
        generator: of the samples.

    Raises:
        ValueError: if a number is not positive.
    """
    if min(words, samples, batch) < 1 or bandwidth <= 0 or ridge < 0:
        raise ValueError(
            "words, samples, batch and bandwidth must be positive, ridge not negative, got "
            f"{words}, {samples}, {batch}, {bandwidth} and {ridge}"
        )
    removed_S = torch.randint(1, words + 1, (samples,), generator=generator)
    removed_S[0] = 0
    rank_Sd = torch.rand(samples, words, generator=generator).argsort(1).argsort(1)
    kept_Sd = rank_Sd >= removed_S[:, None]
    with torch.no_grad():
        y_S = torch.cat([score(part).detach().double().cpu() for part in kept_Sd.split(batch)])
    z_Sd = kept_Sd.double()
    distance_S = 100 * (1 - z_Sd.mean(1).sqrt())
    weight_S = (-(distance_S**2) / (100 * bandwidth) ** 2).exp().sqrt()
    weight_S = weight_S / weight_S.sum()
    mean_d, mean = weight_S @ z_Sd, weight_S @ y_S
    centred_Sd = (z_Sd - mean_d) * (weight_S * samples).sqrt()[:, None]
    gram_dd = centred_Sd.T @ centred_Sd + ridge * torch.eye(words, dtype=torch.double)
    found_d = torch.linalg.solve(gram_dd, centred_Sd.T @ ((y_S - mean) * (weight_S * samples).sqrt()))
    return found_d.float(), float(mean - mean_d @ found_d)
