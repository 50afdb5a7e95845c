"""Matching scores: numbers that say how like the rows of two fields are.

Shape letters: B batch, n, m rows of the two, N = n m pairs, k largest scores, D width, G kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: least length by which a row is divided
EPS = 1e-8


def unit(x: Tensor) -> Tensor:
    """Rows of unit length."""
    return F.normalize(x, dim=-1, eps=EPS)


def top_features(score_Bnm: Tensor, there_Bnm: Tensor, top_k: int) -> Tensor:
    """The `top_k` largest scores in their order, the mean over rows of their largest, and over columns (B, top_k + 2).

    Where there are fewer, there are zeros.

    Args:
        score_Bnm: cosines.
        there_Bnm: bool, which pairs there are: rows that are there with columns that are there.
        top_k: how many.
    """
    hidden_Bnm = score_Bnm.masked_fill(~there_Bnm, -torch.inf)
    flat_BN = hidden_Bnm.flatten(1)
    largest_Bk = flat_BN.topk(min(top_k, flat_BN.shape[1]), dim=1).values
    largest_Bk = F.pad(largest_Bk, (0, top_k - largest_Bk.shape[1]), value=-torch.inf)
    largest_Bk = torch.where(largest_Bk > -torch.inf, largest_Bk, 0)
    means = []
    for axis in (2, 1):
        real = there_Bnm.any(axis)
        best = torch.where(real, hidden_Bnm.amax(axis), 0)
        means.append(best.sum(1) / real.sum(1).clamp(min=1))
    return torch.cat([largest_Bk, torch.stack(means, 1)], 1)


def kernel_centres(kernels: int, sigma: float = 1.0, exact_sigma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Centres and widths (G,) of Gaussian kernels over cosines; the last stands at 1, for exact matches.

    Args:
        kernels: G, 2 at least.
        sigma: width of all others.
        exact_sigma: of that at 1.

    Raises:
        ValueError: if a number is too small.
    """
    if kernels < 2 or min(sigma, exact_sigma) <= 0:
        raise ValueError(f"kernels must be 2 at least and widths positive, got {kernels}, {sigma} and {exact_sigma}")
    step = torch.arange(kernels) / (kernels - 1)
    centre_G = 1 / (kernels - 1) + 2 * step - 1
    exact_G = centre_G > 1
    return centre_G.clamp(max=1.0), torch.where(exact_G, exact_sigma, sigma)


def kernel_features(score_Bnm: Tensor, there_Bnm: Tensor, centre_G: Tensor, sigma_G: Tensor) -> Tensor:
    """sum_i log(1 + sum_j exp(-(S_ij - mu)^2 / (2 sigma^2))), (B, G) (Dai et al., Conv-KNRM, WSDM 2018).

    Args:
        score_Bnm: cosines.
        there_Bnm: bool, as of `top_features`.
        centre_G, sigma_G: of `kernel_centres`.
    """
    off_BGnm = score_Bnm[:, None] - centre_G.view(-1, 1, 1).to(score_Bnm)
    near_BGnm = (-(off_BGnm / sigma_G.view(-1, 1, 1).to(score_Bnm)).square() / 2).exp()
    return (near_BGnm * there_Bnm[:, None]).sum(3).log1p().sum(2)
