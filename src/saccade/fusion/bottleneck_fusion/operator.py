"""MBT: one layer through the bottleneck, the two exchanges without it, and what the classifier returns.

Shape letters: B batch, N tokens of a modality, T tokens of all, S bottlenecks, C channels, K classes, V modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def through_bottleneck(
    blocks: Sequence[nn.Module], z: Sequence[Tensor], bottleneck_BSC: Tensor, real: Sequence[Tensor | None]
) -> tuple[list[Tensor], Tensor]:
    """One fused layer: every modality with the same bottleneck, then the mean of what they made of it.

    Args:
        blocks: a block for each modality, `block(x, mask)`.
        z: the modalities' tokens (B, N, C).
        bottleneck_BSC: the bottleneck of the layer before.
        real: for each modality bool (B, N), True = real token, or None. A row without any is left out of the mean.

    Returns:
        the modalities' tokens, and the new bottleneck.
    """
    S = bottleneck_BSC.shape[1]
    streams, bottlenecks, present = [], [], []
    for block, x_BNC, mask_BN in zip(blocks, z, real, strict=True):
        mask_BT = None if mask_BN is None else F.pad(mask_BN, (0, S), value=True)
        y_BTC = block(torch.cat([x_BNC, bottleneck_BSC], 1), mask_BT)
        streams.append(y_BTC[:, :-S])
        bottlenecks.append(y_BTC[:, -S:])
        present.append(x_BNC.new_ones(x_BNC.shape[0]) if mask_BN is None else mask_BN.any(1).to(x_BNC.dtype))
    if all(mask is None for mask in real):
        return streams, torch.stack(bottlenecks).mean(0)
    weight_VB11 = torch.stack(present)[..., None, None]
    total_B11 = weight_VB11.sum(0)
    mean_BSC = (torch.stack(bottlenecks) * weight_VB11).sum(0) / total_B11.clamp(min=1)
    return streams, torch.where(total_B11 > 0, mean_BSC, bottleneck_BSC)


def across(blocks: Sequence[nn.Module], z: Sequence[Tensor], real: Sequence[Tensor | None]) -> list[Tensor]:
    """One layer of cross attention: each modality's block on [the others | its own], of which its own is kept.

    Args:
        blocks, z, real: as in `through_bottleneck`.
    """
    out = []
    for i, block in enumerate(blocks):
        order = [j for j in range(len(z)) if j != i] + [i]
        y_BTC = block(torch.cat([z[j] for j in order], 1), _joined([real[j] for j in order], [z[j] for j in order]))
        out.append(y_BTC[:, y_BTC.shape[1] - z[i].shape[1] :])
    return out


def jointly(block: nn.Module, z: Sequence[Tensor], real: Sequence[Tensor | None]) -> list[Tensor]:
    """One layer of self-attention over the tokens of all modalities.

    Args:
        block: of all modalities.
        z, real: as in `through_bottleneck`.
    """
    y_BTC = block(torch.cat(list(z), 1), _joined(real, z))
    return list(y_BTC.split([x.shape[1] for x in z], 1))


def _joined(real: Sequence[Tensor | None], z: Sequence[Tensor]) -> Tensor | None:
    if all(mask is None for mask in real):
        return None
    return torch.cat(
        [
            torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
            for mask, x in zip(real, z, strict=True)
        ],
        1,
    )


@dataclass
class MBTOutput:
    """What `MBT` gives.

    Attributes:
        logits: (B, K); with class tokens the mean of `modality_logits`.
        modality_logits: (V, B, K), each modality's own, for a loss term each; None with a pooling classifier.
        tokens: (B, T, C), the normed tokens of all modalities in order, class tokens first in each.
    """

    logits: Tensor
    modality_logits: Tensor | None
    tokens: Tensor
