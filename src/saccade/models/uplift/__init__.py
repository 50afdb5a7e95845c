"""UPLiFT: features of any frozen backbone at the size of its image, by a small network that is applied again and again.

"UPLiFT: Efficient Pixel-Dense Feature Upsampling with Local Attenders", arXiv 2601.17950 (CVPR 2026).

    guide = decoder(x, encoder(image))                      at twice the size of the features x
    A = softmax(W guide + first K channels of guide)        over K fixed offsets (i_k, j_k), without queries and keys
    out[y, x] = sum_k A_k[y, x] x[y // 2 + i_k, x // 2 + j_k];     x <- out, with the same weights, up to the pixels

| symbol | meaning |
|---|---|
| x | features (B, C, h, w): what the backbone gave, or the step before |
| K | offsets: 5, 9, 13, 17 or 25, borders repeated |
| guide | what the decoder makes of the features and the encoder's last two maps |

What comes out is a weighted mean of features nearby, so that it stays among the backbone's features however often it is
enlarged. The paper's logits are the projection alone; the code adds the guide's first channels, and so do we
(`attender_residual`). The encoder's down-sampling forms (LiFT) are not offered: no published model has them.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.uplift.attender import OFFSETS, LocalAttender, local_attend
from saccade.models.uplift.losses import pyramid_loss
from saccade.models.uplift.network import UPLiFT

__all__ = ["OFFSETS", "SD15_VAE", "LocalAttender", "UPLiFT", "local_attend", "pyramid_loss"]

#: constructor arguments for the latents of Stable Diffusion 1.5's VAE, of which the paper prints no size
SD15_VAE = {
    "in_channels": 4, "patch": 8, "iters": 2, "encoder_widths": (64, 128, 256, 512, 512), "encoder_blocks": 2,
    "decoder_width": 512, "decoder_blocks": (1, 2), "convolutions": 1, "norm": "layer", "refiner_blocks": 12,
    "noise": 4,
}  # fmt: skip
_ABOUT = "about 0.8 in the paper"


def _seen(patch: int) -> dict[str, tuple[int, ...]]:
    return {"pixel_values": (1, 3, 32 * patch, 32 * patch), "features": (1, 384, 32, 32)}


register(
    "uplift",
    kind="model",
    summary="A frozen backbone's features at pixel size: repeated x2 steps of a guided weighted mean of neighbours.",
    taxonomy={"sequences": "distinctive", "levels": "multi", "positions": "local", "representations": "single"},
    efficiency="",
    complexity="attender O(K T C) for T output positions, no more memory than its output; linear in pixels",
    invariants=(
        "weights sum to 1; the output lies within the least and the largest of its neighbours, channel by channel",
        "weights all alike give the mean of the neighbours, the same in a whole cell",
        "a weight of 1 on offset (0, 0) is nearest-neighbour enlargement",
        "two steps in one call are a step twice; a shift by whole cells shifts the interior",
    ),
    build=UPLiFT,
    example={"in_channels": 6, "patch": 4, "encoder_widths": (4, 4, 6, 6, 8), "decoder_width": 20},
    inputs=lambda module, size: (
        torch.rand(2, 3, 4 * max(1, size // 4), 4 * max(1, size // 4) + 4),
        torch.randn(2, 6, max(1, size // 4), max(1, size // 4) + 1),
    ),
    published=(
        Published("DINOv2-S/14", {"in_channels": 384, "patch": 14}, 0.8, inputs=_seen(14), tolerance=0.02, note=_ABOUT),
        Published(
            "DINOv3-S+/16", {"in_channels": 384, "patch": 16}, 0.8, inputs=_seen(16), tolerance=0.02, note=_ABOUT
        ),
    ),
)
