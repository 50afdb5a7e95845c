"""HFF-Net: tumours in volumes of several sequences, by a branch for low frequencies and one for high ones.

"Rethinking Brain Tumor Segmentation from the Frequency Domain Perspective", IEEE Transactions on Medical
Imaging 44(11):4536-4553, 2025, arXiv 2506.10142.

    FDD:   slice -> L, a lowpass of it, and H_1 .. H_4, directions of a band above          the network's two inputs
    ALC:   y = x + conv(x),  a 3 x 3 x 3 kernel that starts as the Laplacian                on the high branch's input
    FDCA:  X = F x;  X <- X a_c, X <- X a_p, X <- X a_s;  y = Re F^-1 X                     at 1/8 and 1/16
           a_c = sigmoid(MLP(max) + MLP(mean)), of channels;  a_p = sigmoid(conv([max; mean])), of rows and columns
           a_s = sigmoid(z),  z ~ N(mu, F F^T + diag(d)), of slices
    M5 = up(block([E5s_L, E5s_H, E4d_H])),  M4 = block([E4s_L, E4s_H, E5u_H]),  M = up(block([M4, M5]))    and L <-> H

| here                    | paper                            | default              |
|-------------------------|----------------------------------|----------------------|
| `widths`                | of five levels                   | 16, 32, 64, 128, 256 |
| `depth`                 | slices of a volume               | 128                  |
| `rank`                  | of the slices' covariance        | 5                    |
| `reduction`, `rate`     | of the MLPs of channels, slices  | 16, 4                |
| `AdaptiveLaplacian.held`| important weights, frozen        | none until `consolidate` |

Source: the authors' code, through the card. Where it differs from what the paper means, the paper is the default and
the code an option: it multiplies the spectrum by the map that is attended to (`reading="code"`, which `load` and
`from_authors` take with the authors' weights), so that outputs are of the third order and higher; it draws z at
evaluation too (`draws="always"`), lets no gradient through a draw (`reparameterised=False`), and overwrites the
Laplacian before training (`laplacian_start=False`). Two outputs of either branch are trained, logits and a side output;
`branch` says whose logits count. Frequencies in float32.
"""

from __future__ import annotations

import torch

from saccade.catalogue import Published, register
from saccade.models.hff_net.attention import AdaptiveLaplacian, FrequencyCrossAttention
from saccade.models.hff_net.decomposition import decompose, directions, low_band, pyramid
from saccade.models.hff_net.losses import consolidate, focal_frequency_loss, hff_loss
from saccade.models.hff_net.network import HFFNet

__all__ = [
    "AdaptiveLaplacian",
    "FrequencyCrossAttention",
    "HFFNet",
    "consolidate",
    "decompose",
    "directions",
    "focal_frequency_loss",
    "hff_loss",
    "low_band",
    "pyramid",
]


register(
    "hff-net",
    kind="model",
    summary="Segmentation of volumes by their low and high frequencies, with attention over the Fourier spectrum.",
    supports=(),
    taxonomy={
        "sequences": "co-attention",
        "levels": "multi",
        "positions": "soft",
        "representations": "multi-dimensional",
    },
    efficiency="",
    complexity="FDCA: time O(N log N) per channel for N = D H W voxels; the network is linear in voxels otherwise",
    invariants=(
        "FDCA whose attentions are all 1 returns its input",
        "the adaptive convolution starts as the Laplacian; what is held stays it whatever an optimiser does",
        "the low band of a slope is the slope, inside",
        "a circular shift of a band shifts its directions",
        "FFL is 0 for equal logits, and symmetric",
        "the parameters are the authors' 37.77 million",
    ),
    build=HFFNet,
    example={
        "num_classes": 2,
        "low_channels": 1,
        "high_channels": 2,
        "depth": 17,
        "widths": (2, 3, 4, 4, 6),
        "side": (3, 4),
        "reduction": 2,
    },
    inputs=lambda module, size: tuple(
        torch.randn(2, channels, module.depth, size, size + 2)
        for channels in (module.low_channels, module.high_channels)
    ),
    published=(
        Published(
            "HFF-Net",
            {},
            37.77,
            inputs={"low": (1, 4, 128, 128, 128), "high": (1, 16, 128, 128, 128)},
            note="counted from the authors' code, four classes; no FLOPs published",
        ),
    ),
)
