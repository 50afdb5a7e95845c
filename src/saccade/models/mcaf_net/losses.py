"""What MCAF-Net is trained with: the image, the images of both colour attentions, and a contrast of their projections.

Shape letters: B batch, E width of the projection, N positions, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.mcaf_net.colour import ColourAttention
from saccade.models.mcaf_net.network import MCAFNet
from saccade.models.restoration import SuperResolved


def position_contrast(
    anchor_BEN: Tensor, positive_BEN: Tensor, negative_BEN: Tensor, *, temperature: float = 0.2
) -> Tensor:
    """InfoNCE of positions: -log e^{a . p / t} / (e^{a . p / t} + sum_m e^{a . n_m / t}), the mean over all anchors.

    Vectors are taken at unit length; the negatives of an anchor are those of all positions of its image.

    Args:
        anchor_BEN: anchors.
        positive_BEN: the positive of each.
        negative_BEN: negatives of an image, as many as one likes.
        temperature: t.

    Raises:
        ValueError: if the temperature is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    a_BEN, p_BEN, n_BEN = (F.normalize(x, dim=1) for x in (anchor_BEN, positive_BEN, negative_BEN))
    positive_BN1 = (a_BEN * p_BEN).sum(1)[..., None]
    logits = torch.cat([positive_BN1, a_BEN.mT @ n_BEN], -1) / temperature
    return (logits.logsumexp(-1) - logits[..., 0]).mean()


def dehazing_loss(
    model: MCAFNet,
    output: SuperResolved,
    hazy_B3HW: Tensor,
    clear_B3HW: Tensor,
    *,
    image_weight: float = 0.1,
    contrast_weight: float = 0.05,
    temperature: float = 0.2,
    positions: int = 256,
    generator: torch.Generator | None = None,
) -> Tensor:
    """L1(J, clear) + w_f sum L1(image_i, clear) + w_c sum contrast(anchor_i; clear's projection, hazy's projection).

    The paper's code has no training; the terms and the starting values of their weights are the card's (inferred).

    Args:
        model: gave the output, in training mode.
        output: of the hazy images.
        hazy_B3HW, clear_B3HW: pairs.
        image_weight, contrast_weight: w_f and w_c.
        temperature: of the contrast.
        positions: drawn anew for each level, at most those that there are.
        generator: of the positions; torch's global one where None.

    Raises:
        ValueError: if the output has no inner images though the model has colour heads: it was not in training mode.
    """
    loss = (output.image - clear_B3HW).abs().mean()
    heads = [colour for colour in model.colour if isinstance(colour, ColourAttention) and colour.projection]
    images, anchors = output.inner_images or [], output.inner_embeddings or []
    if len(images) != len(heads):
        raise ValueError("output must be one of training mode, with the images of the colour attentions; it has none")
    for colour, image_B3HW, anchor_BEHW in zip(heads, images, anchors):
        loss = loss + image_weight * (image_B3HW - clear_B3HW).abs().mean()
        chosen = torch.randperm(image_B3HW[0, 0].numel(), generator=generator)[:positions].to(image_B3HW.device)
        clear, hazy = (colour.project(whole.flatten(2)[..., chosen, None])[..., 0] for whole in (clear_B3HW, hazy_B3HW))
        contrast = position_contrast(anchor_BEHW.flatten(2)[..., chosen], clear, hazy, temperature=temperature)
        loss = loss + contrast_weight * contrast
    return loss
