"""What StyA2K is trained on: Adam at 2e-4, batches of 8 crops of 256 pixels of MS-COCO and WikiArt, five epochs.

    L = 10 L_global + 1.25 L_A2K
    L_global = sum over relu1_1 .. relu4_1 of MSE(means) + MSE(deviations) of stylised and style
    L_A2K    = sum over relu2_1 .. relu5_1 of MSE(stylised, A2K0 + content)

A2K0 is key-wise attention without parameters: queries and keys are all layers up to this one, the shallower ones
resized, each with mean 0 and variance 1; values are the style's features.

Shape letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.models.stya2k.attention import mean_std, mvn
from saccade.models.stya2k.network import StyA2K
from saccade.ops.keywise import distributed_attention, progressive_attention

#: sides of regions at relu2_1 to relu5_1
REGIONS = (16, 8, 8, 4)


def global_loss(stylised: Sequence[Tensor], style: Sequence[Tensor]) -> Tensor:
    """Means and deviations of relu1_1 to relu4_1 of the two.

    Args:
        stylised, style: relu1_1 to relu5_1 of each.
    """
    pairs = (zip(mean_std(x), mean_std(y), strict=True) for x, y in zip(stylised[:4], style[:4], strict=True))
    return torch.stack([F.mse_loss(*pair) for moments in pairs for pair in moments]).sum()


@torch.no_grad()
def keywise_targets(
    content: Sequence[Tensor], style: Sequence[Tensor], *, num_heads: int = 8, regions: Sequence[int] = REGIONS
) -> list[Tensor]:
    """What relu2_1 to relu5_1 of the stylised image should be: A2K0 + content.

    Args:
        content, style: relu1_1 to relu5_1 of each.
        num_heads: divides the layers' widths.
        regions: sides of regions at relu2_1 to relu5_1.
    """
    targets = []
    for layer, region in enumerate(regions, 1):
        q_BCHW, k_BCHW = (_up_to(features, layer) for features in (content, style))
        options = {"region": region, "num_heads": num_heads}
        distributed = distributed_attention(q_BCHW, k_BCHW, style[layer], **options)
        progressive, _ = progressive_attention(q_BCHW, k_BCHW, style[layer], **options)
        targets.append(distributed + progressive + content[layer])
    return targets


def stylisation_loss(
    model: StyA2K, content: Tensor, style: Tensor, *, num_heads: int = 8, regions: Sequence[int] = REGIONS
) -> dict[str, Tensor]:
    """The terms "global" and "a2k", and their weighted sum "loss".

    Args:
        model: whose encoder judges, too.
        content, style: images (B, 3, H, W) in [0, 1].
        num_heads, regions: as in `keywise_targets`.
    """
    c, s = model.encoder(content), model.encoder(style)
    stylised = model.encoder(model.stylise(c, s))
    targets = keywise_targets(c, s, num_heads=num_heads, regions=regions)
    local = torch.stack([F.mse_loss(x, target) for x, target in zip(stylised[1:], targets, strict=True)]).sum()
    whole = global_loss(stylised, s)
    return {"global": whole, "a2k": local, "loss": 10 * whole + 1.25 * local}


def learning_rate(epoch: int) -> float:
    """Of the epochs 0, 1, ..: 2e-4 for two, then 0.3 of the last.

    >>> [round(learning_rate(epoch), 7) for epoch in range(5)]
    [0.0002, 0.0002, 6e-05, 1.8e-05, 5.4e-06]
    """
    return 2e-4 * 0.3 ** max(0, epoch - 1)


def _up_to(features: Sequence[Tensor], layer: int) -> Tensor:
    """The layers up to this one at its size, side by side."""
    size = features[layer].shape[2:]
    shallower = [F.interpolate(mvn(x), size, mode="nearest") for x in features[:layer]]
    return torch.cat([*shallower, mvn(features[layer])], 1)
