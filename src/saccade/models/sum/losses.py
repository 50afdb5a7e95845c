"""The loss of training: a map against the density of fixations, by four measures of the field and their square error.

Shape letters: B batch, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.ops.autocast import exact
from saccade.ops.saliency import correlation, divergence, scanpath_saliency, similarity

#: of the terms in the loss
WEIGHTS: Mapping[str, float] = {"kl": 10.0, "cc": -2.0, "sim": -1.0, "nss": -1.0, "mse": 5.0}


@exact
def saliency_loss(
    map_BHW: Tensor, density_BHW: Tensor, fixations_BHW: Tensor | None = None, weights: Mapping[str, float] = WEIGHTS
) -> tuple[Tensor, dict[str, Tensor]]:
    """10 KL - 2 CC - SIM - NSS + 5 MSE, the mean over images, and the terms by name.

        p = map / sum map, g = density / sum density
        KL = sum g log(eps + g / (p + eps))      CC = Pearson's correlation of map and density
        SIM = sum min(p', g'), of maps from 0 to their largest value, with sum 1
        NSS = the mean over fixated pixels of (map - mean) / std

    Args:
        map_BHW: predicted, in [0, 1].
        density_BHW: of fixations, with a largest value of 1 as images have it.
        fixations_BHW: above 0 where somebody looked; None leaves NSS out.
        weights: of the terms; 0 or absent leaves one out of the sum.

    Raises:
        ValueError: if shapes differ, or a term is unknown.
    """
    if map_BHW.ndim != 3 or map_BHW.shape != density_BHW.shape:
        raise ValueError(
            f"map and density must be (batch, height, width), got {tuple(map_BHW.shape)} and {tuple(density_BHW.shape)}"
        )
    if fixations_BHW is not None and fixations_BHW.shape != map_BHW.shape:
        raise ValueError(f"fixations must be {tuple(map_BHW.shape)}, got {tuple(fixations_BHW.shape)}")
    if strange := set(weights) - set(WEIGHTS):
        raise ValueError(f"weights must be of {', '.join(WEIGHTS)}, got {', '.join(sorted(strange))}")
    p, g = (x.flatten(1).to(torch.promote_types(torch.float32, map_BHW.dtype)) for x in (map_BHW, density_BHW))
    terms = {
        "kl": divergence(p, g).mean(),
        "cc": correlation(p, g).mean(),
        "sim": similarity(p, g).mean(),
        "mse": F.mse_loss(p, g),
    }
    if fixations_BHW is not None:
        terms["nss"] = scanpath_saliency(p, fixations_BHW.flatten(1) > 0).mean()
    return sum((weights.get(name, 0.0) * term for name, term in terms.items()), p.new_zeros(())), terms
